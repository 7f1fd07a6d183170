"""Biases that train, alone and beside LoRA."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import oarsmith
from oarsmith.adapters.merge import merge_adapter
from oarsmith.adapters.peft_layout import WEIGHTS
from oarsmith.errors import CheckpointError, ConfigError

from .conftest import Adapted, Base, mixtral, tokens
from .with_parts import answers_as_forward, loss_of, off_is_base, packed_as_alone, read, saved, trained, under

IDS = tokens(2, 17)
BITFIT: dict[str, Any] = {"adapter_type": "bitfit"}
SOME = {"llama": ("q_proj", "v_proj"), "gpt2": ("mlp.c_fc",), "bloom": ("query_key_value",)}


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_beside_lora(base: Callable[[str], Base], tmp_path: Path, name: str, bias: str) -> None:
    """PEFT reads ours, and has the same gradients: of a fused map's biases those of the chosen projections."""
    own = base(name)
    model = under(own.path, adapter_type="lora", lora_rank=2, lora_bias=bias, lora_target_modules=SOME[name])
    before = model.eval()(IDS).detach()
    assert torch.equal(before, oarsmith.load_model(own.path, device="cpu")(IDS))
    with torch.no_grad():
        for key, tensor in model.parts[0].stored(model).items():
            tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(key))))
    folder = saved(model, tmp_path / "a", own.path)
    oracle = peft.PeftModel.from_pretrained(own.oracle(), folder, is_trainable=True).eval()
    expected, found = model(IDS), oracle(IDS).logits
    assert (expected - before).abs().max() > 0.05
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    loss_of(found, IDS).backward()
    loss_of(expected, IDS).backward()
    theirs = {n.replace(".default", ""): p for n, p in oracle.named_parameters() if p.requires_grad and "bias" in n}
    ours = dict(model.named_parameters())
    places = model.parts[0]._places(model)
    assert set(places) == set(theirs)
    for key, place in places.items():
        gradient = place.view(ours[place.parameter].grad)
        torch.testing.assert_close(gradient, theirs[key].grad, rtol=1e-3, atol=1e-6)
    trains = sum(place.view(ours[place.parameter]).numel() for place in places.values())
    moved = [p.grad.count_nonzero() for n, p in ours.items() if n.endswith(".bias") and p.grad is not None]
    assert sum(map(int, moved)) <= trains
    off_is_base(model, own.path)
    torch.testing.assert_close(model(IDS), expected, rtol=0, atol=0)
    torch.testing.assert_close(merge_adapter(read(own.path, folder))(IDS), expected, rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_peft_s(adapted: Callable[..., Adapted], tmp_path: Path, name: str) -> None:
    made = adapted(name, r=2, bias="all", target_modules=list(SOME[name]))
    model, expected = read(made.base.path, made.path), made.oracle(IDS).logits
    torch.testing.assert_close(model(IDS), expected, rtol=0, atol=1e-4)
    off_is_base(model, made.base.path)
    again, stored = (load_file(f / WEIGHTS) for f in (saved(model, tmp_path / "a", made.base.path), made.path))
    assert again.keys() == stored.keys() and all(torch.equal(again[key], stored[key]) for key in stored)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_alone(base: Callable[[str], Base], tmp_path: Path, name: str) -> None:
    path = base(name).path
    model = under(path, **BITFIT)
    plain = oarsmith.load_model(path, device="cpu")
    assert torch.equal(model.eval()(IDS), plain(IDS))
    training = {n for n, p in model.named_parameters() if p.requires_grad}
    assert training == {n for n, _ in plain.named_parameters() if n.endswith(".bias")} != set()
    trained(model)
    packed_as_alone(model)
    answers_as_forward(model)
    off_is_base(model, path)
    expected = model(IDS)
    assert (expected - plain(IDS)).abs().max() > 0.05
    folder = saved(model, tmp_path / "a", path)
    assert all(key.endswith(".bias") for key in load_file(folder / WEIGHTS))
    again = read(path, folder)
    assert torch.equal(again(IDS), expected)
    merged = merge_adapter(again)
    oarsmith.save_model(merged, tmp_path / "merged")
    assert torch.equal(oarsmith.load_model(tmp_path / "merged", device="cpu")(IDS), expected)


def test_refusals(base: Callable[[str], Base], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no biases that could train"):
        under(mixtral(tmp_path / "mixtral"), **BITFIT)
    with pytest.raises(ConfigError, match="no biases that could train"):
        under(base("llama").path, lora_bias="lora_only", adapter_type="lora", lora_target_modules=("down_proj",))
    path = base("llama").path
    folder = saved(under(path, **BITFIT), tmp_path / "a", path)
    stored = load_file(folder / WEIGHTS)
    odd = "base_model.model.model.layers.9.self_attn.q_proj.bias"
    save_file({**stored, odd: torch.zeros(24)}, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match=f"tensor {odd} has no place in this model"):
        read(path, folder)
    save_file({"other": torch.zeros(24)}, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match="no biases in the file"):
        read(path, folder)
