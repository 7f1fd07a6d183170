"""LoRA-GA's start beside the singular vectors of a gradient that is whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import oarsmith
from oarsmith.adapters.forms import INT8_ROWS
from oarsmith.adapters.linear import adapted_modules
from oarsmith.adapters.lora import Lora
from oarsmith.adapters.loraga import LoraGa, start_from_gradients
from oarsmith.adapters.merge import merge_adapter
from oarsmith.adapters.peft_layout import load_adapter_weights
from oarsmith.checkpoint.hf import load_decoder
from oarsmith.errors import ConfigError
from oarsmith.models.decoder import Decoder

from .conftest import Base, mixtral, tokens
from .relatives import SOME, by_peft, close, logits, saved, settings, trained, under

GA = LoraGa(rank=3, alpha=5.0, rslora=True, gamma=4.0)


def started(path: Path, targets: str | tuple[str, ...], change: LoraGa = GA, **arguments: object) -> Decoder:
    model = under(path, change, targets, **arguments)
    calls = []

    def backward() -> None:
        calls.append(sum(p.numel() for p in model.parameters() if p.requires_grad))
        for ids in (tokens(2, 9), tokens(1, 9, seed=2)):
            (loss_on(model, ids) / 2).backward()

    start_from_gradients(model, backward, seed=1)
    assert len(calls) == 10 and all(parameter.grad is None for parameter in model.parameters())
    return model


def loss_on(model: Decoder, ids: Tensor) -> Tensor:
    found = model(ids)
    return torch.nn.functional.cross_entropy(found[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def gradients(path: Path) -> dict[str, Tensor]:
    """Of all weights of the base, by their names."""
    model = load_decoder(path).requires_grad_(True)
    for ids in (tokens(2, 9), tokens(1, 9, seed=2)):
        (loss_on(model, ids) / 2).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check(a: Tensor, b: Tensor, gradient: Tensor, change: LoraGa = GA) -> None:
    """c times the first r right and the next r left singular vectors, up to their common signs."""
    factor = gradient.shape[0] ** 0.25 / change.gamma**0.5
    u, s, vt = torch.linalg.svd(gradient.double())
    r = change.rank
    assert s[r - 1] > 1.02 * s[r] and s[2 * r - 1] > 1.01 * s[2 * r], "apart"
    for found, expected in ((a, vt[:r]), (b.t(), u[:, r : 2 * r].t())):
        overlap = (found.double() / factor) @ expected.t()
        close(overlap.abs(), torch.eye(r).double(), atol=2e-3)


def test_the_paper_s_start(base: Callable[[str], Base]) -> None:
    """Fused, with some chosen only, and others."""
    path = base("llama").path
    model, whole = started(path, SOME["llama"]), gradients(path)
    for layer in range(2):
        qkv = model.get_submodule(f"layers.{layer}.attention.qkv")
        gradient = whole[f"layers.{layer}.attention.qkv.weight"]
        for segment, rows in (("q_proj", slice(0, 24)), ("v_proj", slice(36, 48))):
            table = qkv.adapter[segment]
            check(table["lora_A"], table["lora_B"], gradient[rows])
            assert torch.equal(table["lora_A"], table["start_A"]) and torch.equal(table["lora_B"], table["start_B"])
    trains = {name.rsplit(".", 1)[-1] for name, p in model.named_parameters() if p.requires_grad}
    assert trains == {"lora_A", "lora_B"}
    assert {type(c) for _, module in adapted_modules(model) for c in module.changes.values()} == {LoraGa}


def test_the_scale() -> None:
    assert replace(GA, alpha=16.0, rank=4).scale == 8.0
    model_a, model_b = GA.from_gradient(torch.eye(16)[:, :6], torch.eye(9)[:6])
    close(model_a, torch.eye(9)[:3])
    close(model_b, torch.eye(16)[:, 3:6])


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_start_merge_and_files(base: Callable[[str], Base], tmp_path: Path, name: str) -> None:
    path = mixtral(tmp_path / name) if name == "mixtral" else base(name).path
    plain, model = logits(load_decoder(path)), started(path, SOME[name])
    assert torch.equal(logits(model), plain)
    tables = [table for _, module in adapted_modules(model) for table in module.adapter.values()]
    assert all(float(table["start_B"].detach().abs().max()) > 0.1 for table in tables)
    before = logits(trained(model))
    folder = saved(model, tmp_path / "a")
    assert settings(folder)["r"] == 6
    again = oarsmith.load_model(path, adapter=folder, device="cpu")
    assert {type(c) for _, module in adapted_modules(again) for c in module.changes.values()} == {Lora}
    close(logits(again), before)
    resumed = under(path, GA, SOME[name])
    load_adapter_weights(resumed, folder)
    for key, tensor in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], tensor), key
    if name != "mixtral":
        close(logits(by_peft(base(name), folder)), before)
    close(logits(merge_adapter(model)), before, atol=1e-4)


def test_experts(tmp_path: Path) -> None:
    """Each has its own gradient; one that no token reaches starts as LoRA does."""
    path = mixtral(tmp_path / "base")
    model, whole = started(path, "w1"), gradients(path)
    table, gradient = model.layers[0].ffn.experts.gate_up.adapter["w1"], whole["layers.0.ffn.experts.gate_up.weight"]
    reached = 0
    for expert in range(3):
        rows = gradient[expert, :16]
        if rows.any():
            reached += 1
            check(table["lora_A"][expert], table["lora_B"][expert], rows)
        else:
            assert not table["lora_B"][expert].any()
    assert reached > 1


def test_over_8_bits_and_the_same_seed(base: Callable[[str], Base]) -> None:
    path = base("llama").path
    first, again, small = (started(path, "q_proj", form=form) for form in (None, None, INT8_ROWS))
    tables = [m.layers[0].attention.qkv.adapter["q_proj"] for m in (first, again, small)]
    assert torch.equal(tables[0]["lora_B"], tables[1]["lora_B"])
    near = torch.linalg.svdvals(tables[0]["lora_A"] @ tables[2]["lora_A"].t())
    assert near.min() > 0.8 * near.max(), "nearly the same directions"


def test_what_it_needs(base: Callable[[str], Base]) -> None:
    with pytest.raises(ConfigError, match="loraga with rank 7 needs 14 singular vectors"):
        under(base("llama").path, replace(GA, rank=7), "k_proj")
