"""Undoing a merge in memory: the base bit for bit, the adapter beside it again; and taking one off merged weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import oarsmith
from oarsmith.adapters.adapted import adapted_maps
from oarsmith.adapters.linear import attach, disabled
from oarsmith.adapters.merge import without_adapter
from oarsmith.adapters.parts import rewrite_of
from oarsmith.adapters.take_off import take_off_adapter
from oarsmith.checkpoint.hf import load_decoder
from oarsmith.config.adapters import AdapterKeys
from oarsmith.errors import ConfigError
from oarsmith.models.decoder import Decoder

from .conftest import Base, tokens
from .with_parts import read, saved, trained, under

IDS = tokens(2, 17)
BOTH = ("embed_tokens", "lm_head", "k_proj")
RANK = {"lora_rank": 3}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"adapter_type": "lora", **RANK},
    "ends": {"adapter_type": "lora", **RANK, "lora_target_modules": BOTH},
    "dora": {"adapter_type": "dora", **RANK},
    "pissa": {"adapter_type": "pissa", **RANK},
    "loha": {"adapter_type": "loha", **RANK},
    "lokr": {"adapter_type": "lokr", **RANK},
    "vera": {"adapter_type": "vera", **RANK},
    "mora": {"adapter_type": "mora", "lora_rank": 4},
    "fourierft": {"adapter_type": "fourierft", "fourierft_frequencies": 50},
    "oft": {"adapter_type": "oft"},
    "ia3": {"adapter_type": "ia3"},
    "bitfit": {"adapter_type": "bitfit"},
    "rows": {"adapter_type": "trainable_tokens", "trainable_tokens": [1, 5]},
}
ADDING = ("lora", "ends", "pissa", "loha", "lokr", "vera", "mora", "fourierft")


def weights(model: Decoder) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_bit_for_bit(base: Callable[[str], Base], name: str, method: str, dtype: torch.dtype) -> None:
    if (name, method) == ("mistral", "bitfit"):
        pytest.skip("it has no biases")
    path = base(name).path
    model = load_decoder(path, dtype=dtype, rewrite=rewrite_of(AdapterKeys(**METHODS[method]), path))
    attach(model, seed=3)
    model = trained(model, std=0.1)
    before, expected, config, spec = weights(model), model(IDS), dict(model.config), model.spec
    with disabled(model):
        plain = model(IDS)
    assert oarsmith.merge_adapter(model) is model and not list(adapted_maps(model)) and not len(model.parts)
    merged = model(IDS)
    assert torch.equal(oarsmith.merge_adapter(model)(IDS), merged), "there is nothing more to merge"
    assert oarsmith.unmerge_adapter(model) is model
    after = weights(model)
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert model.config == config and model.spec == spec
    assert torch.equal(model(IDS), expected)
    with disabled(model):
        assert torch.equal(model(IDS), plain)
    assert torch.equal(oarsmith.merge_adapter(model)(IDS), merged), "and again"


def test_as_peft_does(base: Callable[[str], Base], tmp_path: Path) -> None:
    """Its merge_adapter and unmerge_adapter give the same logits on the way."""
    import peft

    own = base("llama")
    model = trained(under(own.path, **METHODS["lora"]))
    folder = saved(model, tmp_path / "a", own.path)
    oracle = peft.PeftModel.from_pretrained(own.oracle(), folder).eval()
    with torch.no_grad():
        for call, theirs in ((oarsmith.merge_adapter, "merge_adapter"), (oarsmith.unmerge_adapter, "unmerge_adapter")):
            call(model)
            getattr(oracle, theirs)()
            torch.testing.assert_close(model(IDS), oracle(IDS).logits, rtol=0, atol=1e-4)


def test_nothing_to_undo(base: Callable[[str], Base]) -> None:
    model = trained(under(base("llama").path, **METHODS["lora"]))
    with pytest.raises(ConfigError, match="nothing is merged into this model that could be undone"):
        oarsmith.unmerge_adapter(model)
    oarsmith.merge_adapter(model, keep=False)
    with pytest.raises(ConfigError, match="nothing is merged"):
        oarsmith.unmerge_adapter(model)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ADDING)
def test_taken_off(base: Callable[[str], Base], tmp_path: Path, name: str, method: str, dtype: torch.dtype) -> None:
    """No weight is further from the base's than is told; in bf16 most are the same."""
    own = base(name)
    folder = saved(trained(under(own.path, **METHODS[method]), std=0.02), tmp_path / "a", own.path)
    first = oarsmith.load_model(own.path, dtype=dtype, adapter=folder, device="cpu")
    truth = oarsmith.load_model(own.path, dtype=dtype, device="cpu")
    oarsmith.save_model(oarsmith.merge_adapter(first, keep=False), tmp_path / "merged")
    merged = oarsmith.load_model(tmp_path / "merged", dtype=dtype, device="cpu")
    model = oarsmith.load_model(tmp_path / "merged", dtype=dtype, adapter=folder, device="cpu", any_base=True)
    told = take_off_adapter(model)
    torch.testing.assert_close(model(IDS), merged(IDS), rtol=0, atol=1e-3 if dtype == torch.float32 else 0.6)
    found, expected = weights(without_adapter(model)), weights(truth)
    if method == "ends" and name == "mistral":
        expected["head.weight"] = expected["embedding.weight"]
    assert found.keys() == expected.keys()
    furthest = max(float((found[key].float() - expected[key].float()).abs().max()) for key in expected)
    # Products of fp32 round for themselves.
    assert furthest <= told + 1e-6 and told < (0.05 if dtype == torch.bfloat16 else 1e-6)
    assert furthest < (merged_difference := max_difference(merged, expected)) / 2, merged_difference


def max_difference(model: Decoder, expected: dict[str, Tensor]) -> float:
    own = weights(model)
    return max(float((own[key].float() - expected[key].float()).abs().max()) for key in expected)


@pytest.mark.parametrize("method", sorted(METHODS.keys() - set(ADDING)))
def test_what_cannot_be_taken_off(base: Callable[[str], Base], tmp_path: Path, method: str) -> None:
    own = base("llama")
    folder = saved(trained(under(own.path, **METHODS[method]), std=0.02), tmp_path / "a", own.path)
    before = weights(model := read(own.path, folder))
    with pytest.raises(ConfigError, match="taking it off needs the base"):
        take_off_adapter(model)
    assert all(torch.equal(weight, before[key]) for key, weight in weights(model).items())


def test_one_that_was_made_of_the_weight(base: Callable[[str], Base]) -> None:
    """What is merged would be made of the merged weight."""
    model = trained(under(base("llama").path, **METHODS["pissa"]))
    for _, module in adapted_maps(model):
        module.changes = {name: replace(change, raw=True) for name, change in module.changes.items()}
    with pytest.raises(ConfigError, match="needs the base"):
        take_off_adapter(model)
