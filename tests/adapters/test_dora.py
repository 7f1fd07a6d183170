"""DoRA beside PEFT's and beside the paper's formula."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

import oarsmith
from oarsmith.adapters.dora import Dora
from oarsmith.adapters.forms import INT8_ROWS
from oarsmith.adapters.linear import Adapt, adapted_modules
from oarsmith.errors import CheckpointError
from oarsmith.models.spec_parts import LinearSpec, Segment

from .conftest import Adapted, Base, mixtral
from .relatives import (
    SOME,
    by_peft,
    close,
    logits,
    our_gradients,
    peft_gradients,
    same_as_peft,
    saved,
    settings,
    trained,
    under,
    whole,
)

DORA = Dora(rank=3, alpha=7.5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_s_adapter(adapted: Callable[..., Adapted], tmp_path: Path, name: str, rslora: bool) -> None:
    made = adapted(name, r=4, lora_alpha=6, target_modules=list(SOME[name]), use_dora=True, use_rslora=rslora)
    ours = same_as_peft(made, tmp_path / "again")
    assert all(isinstance(c, Dora) for _, module in adapted_modules(ours) for c in module.changes.values())
    assert settings(tmp_path / "again")["use_dora"] is True


def test_gradients_are_peft_s(base: Callable[[str], Base], tmp_path: Path) -> None:
    """With that of the length, and none through the norm."""
    model = trained(under(base("llama").path, DORA, SOME["llama"]))
    theirs = peft_gradients(by_peft(base("llama"), saved(model, tmp_path / "a")))
    ours = our_gradients(model)
    assert len(ours) == len(theirs) == 18
    for layer in range(2):
        for module, segment in (("attention.qkv", "q_proj"), ("attention.qkv", "v_proj"), ("ffn.down", "down_proj")):
            where = "self_attn" if module == "attention.qkv" else "mlp"
            for ending in ("lora_A", "lora_B", "lora_magnitude_vector"):
                key = f"base_model.model.model.layers.{layer}.{where}.{segment}.{ending}.weight"
                (name,) = [
                    n for n in ours if n.startswith(f"layers.{layer}.{module}.") and n.endswith(f"{segment}.{ending}")
                ]
                close(ours[name], theirs[key])


def test_the_formula() -> None:
    """Fused, some segments only, a bias: in fp64, with the norm held fixed."""
    spec = LinearSpec(
        in_features=6,
        segments=(Segment(name="q", size=4), Segment(name="k", size=3), Segment(name="v", size=5)),
        bias=True,
    )
    adapt = Adapt(changes=(("v", Dora(rank=2, alpha=1.0)), ("q", Dora(rank=3, alpha=-6.0))))
    module = adapt.build(replace(spec, rewrite=adapt))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = torch.randn(7, 6, generator=generator)
    parts = []
    for segment, start, stop in spec.bounds():
        weight, bias = module.weight[start:stop].double(), module.bias[start:stop].double()
        if segment.name in module.changes:
            table, change = module.adapter[segment.name], module.changes[segment.name]
            assert isinstance(change, Dora)
            weight = weight + change.scale * table["lora_B"].double() @ table["lora_A"].double()
            length = weight.detach().norm(dim=1, keepdim=True)
            weight = table["lora_magnitude_vector"].double()[:, None] * weight / length
        parts.append(functional.linear(x.double(), weight, bias))
    expected, found = torch.cat(parts, -1), module(x)
    close(found.double(), expected)
    leaves = list(module.parameters())
    pairs = zip(
        torch.autograd.grad(found.square().sum(), leaves),
        torch.autograd.grad(expected.square().sum(), leaves),
        strict=True,
    )
    for ours, theirs in pairs:
        close(ours, theirs, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_start_and_merge(base: Callable[[str], Base], tmp_path: Path, name: str) -> None:
    path = mixtral(tmp_path / name) if name == "mixtral" else base(name).path
    whole(path, DORA, SOME[name])
    whole(path, replace(DORA, dropout=0.1), "all-linear")


def test_the_start_is_exact(base: Callable[[str], Base]) -> None:
    model = under(base("llama").path, DORA, "all-linear")
    assert torch.equal(logits(model), logits(oarsmith.load_model(base("llama").path, device="cpu")))
    bare = under(base("llama").path, DORA, "q_proj")
    module = next(module for _, module in adapted_modules(bare))
    with torch.no_grad():
        module.weight[0] = 0
        module.reset(torch.Generator())
    assert logits(bare).isfinite().all(), "a row of zeros"


def test_over_8_bits(base: Callable[[str], Base]) -> None:
    whole(base("llama").path, DORA, SOME["llama"], INT8_ROWS)


def test_damaged(adapted: Callable[..., Adapted]) -> None:
    made = adapted("llama", r=2, target_modules=["q_proj"], use_dora=True)
    path = made.path / "adapter_model.safetensors"
    stored = load_file(path)
    lost = next(key for key in stored if key.endswith("lora_magnitude_vector"))
    save_file({key: tensor for key, tensor in stored.items() if key != lost}, path)
    with pytest.raises(CheckpointError, match=f"tensor {lost} is missing"):
        oarsmith.load_model(made.base.path, adapter=made.path, device="cpu")
