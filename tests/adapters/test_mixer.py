"""MoSLoRA: LoRA to anything that reads its file, and itself to a run that goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import oarsmith
from oarsmith.adapters.exact_file import EXACT
from oarsmith.adapters.forms import INT8_ROWS
from oarsmith.adapters.linear import adapted_modules
from oarsmith.adapters.lora import Lora
from oarsmith.adapters.mixer import Mixed
from oarsmith.adapters.peft_layout import load_adapter_weights
from oarsmith.errors import CheckpointError

from .conftest import Base, mixtral
from .relatives import SOME, by_peft, close, logits, our_gradients, saved, trained, under, whole

MIXED = Mixed(rank=4, alpha=6.0)


def test_the_formula(base: Callable[[str], Base]) -> None:
    """W + scale B M A, and its gradients, in fp64."""
    model = trained(under(base("llama").path, MIXED, "down_proj"), std=0.3)
    module = next(module for _, module in adapted_modules(model))
    table = module.adapter["down_proj"]
    a, m, b = (table[name].detach().double().requires_grad_() for name in ("lora_A", "lora_mixer", "lora_B"))
    x = torch.randn(5, module.spec.in_features, generator=torch.Generator().manual_seed(1))
    weight = module.weight.double() + 1.5 * b @ m @ a
    expected, found = x.double() @ weight.t(), module(x)
    close(found.double(), expected, atol=1e-4)
    theirs = torch.autograd.grad(expected.square().mean(), [a, m, b])
    ours = torch.autograd.grad(found.square().mean(), [table[n] for n in ("lora_A", "lora_mixer", "lora_B")])
    for one, other in zip(ours, theirs, strict=True):
        close(one.double(), other, atol=1e-4)


def test_the_start_of_the_mixer(base: Callable[[str], Base]) -> None:
    model = under(base("llama").path, replace(MIXED, rank=12), "all-linear")
    drawn = torch.cat([p.flatten() for name, p in model.named_parameters() if name.endswith("lora_mixer")])
    bound = 12**-0.5
    assert bound * 0.95 < drawn.max() <= bound and -bound <= drawn.min() < -bound * 0.95
    assert len(our_gradients(model)) == 3 * 14


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_start_and_merge(base: Callable[[str], Base], tmp_path: Path, name: str) -> None:
    path = mixtral(tmp_path / name) if name == "mixtral" else base(name).path
    whole(path, MIXED, SOME[name])
    whole(path, replace(MIXED, dropout=0.1), "all-linear")


def test_over_8_bits(base: Callable[[str], Base]) -> None:
    whole(base("llama").path, MIXED, SOME["llama"], INT8_ROWS)


def test_files(base: Callable[[str], Base], tmp_path: Path) -> None:
    made = base("llama")
    model = trained(under(made.path, MIXED, SOME["llama"]))
    folder = saved(model, tmp_path / "a")
    close(logits(by_peft(made, folder)), logits(model))
    as_lora = oarsmith.load_model(made.path, adapter=folder, device="cpu")
    assert {type(c) for _, module in adapted_modules(as_lora) for c in module.changes.values()} == {Lora}
    close(logits(as_lora), logits(model))
    resumed = trained(under(made.path, MIXED, SOME["llama"]), std=1.0)
    load_adapter_weights(resumed, folder)
    for name, tensor in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    kept = load_file(folder / EXACT)
    lost = sorted(kept)[0]
    save_file({key: tensor for key, tensor in kept.items() if key != lost}, folder / EXACT)
    with pytest.raises(CheckpointError, match=f"tensor {lost} is missing"):
        load_adapter_weights(resumed, folder)
    (folder / EXACT).unlink()
    load_adapter_weights(resumed, folder)
    close(logits(resumed), logits(model))


def test_experts_files(tmp_path: Path) -> None:
    path = mixtral(tmp_path / "base")
    model = trained(under(path, MIXED, "w1"))
    folder = saved(model, tmp_path / "a")
    resumed = trained(under(path, MIXED, "w1"), std=1.0)
    load_adapter_weights(resumed, folder)
    for name, tensor in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
