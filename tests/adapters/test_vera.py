"""VeRA beside PEFT, whose random matrices are shared by all projections."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import oarsmith
from oarsmith.adapters.change import Change, Size
from oarsmith.adapters.linear import adapted_modules
from oarsmith.adapters.peft_layout import CONFIG, WEIGHTS, adapter_rewrite, adapter_tensors, load_adapter_weights
from oarsmith.adapters.targets import match_targets
from oarsmith.adapters.vera import Projection, Vera
from oarsmith.checkpoint.hf import load_decoder

from .beside_peft import fresh, randomised, read, read_by_peft, refused, same_answers_and_merge, same_gradients, saved
from .conftest import Adapted, Base, tokens

SHARED = ("base_model.vera_A", "base_model.vera_B")
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "all": ("llama", {"r": 8, "target_modules": "all-linear"}),
    "parts of a fused map": ("llama", {"r": 3, "target_modules": ["q_proj", "v_proj"], "projection_prng_key": 5}),
    "not in the file": ("llama", {"r": 8, "target_modules": ["down_proj", "k_proj"], "save_projection": False}),
    "gpt2": ("gpt2", {"r": 8, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:Specified to not")
def test_peft_s(adapted: Callable[..., Adapted], name: str) -> None:
    kind, arguments = CASES[name]
    made = adapted(kind, kind=peft.VeraConfig, **arguments)
    same_gradients(made, "vera_lambda", SHARED)
    same_answers_and_merge(made)


@pytest.mark.parametrize("save", [True, False])
@pytest.mark.filterwarnings("ignore:Specified to not")
def test_ours(base: Callable[[str], Base], tmp_path: Path, save: bool) -> None:
    change = Vera(rank=6, key=9, d_initial=0.3, save_projection=save)

    def choose(modules: Any) -> dict[str, Change]:
        return dict.fromkeys(match_targets(modules, ("q_proj", "down_proj")), change)

    read_by_peft(base("llama"), tmp_path / "adapter", choose, std=0.3)
    stored = load_file(tmp_path / "adapter" / WEIGHTS)
    assert (stored.keys() >= set(SHARED)) == save
    if save:
        assert stored[SHARED[0]].shape == (6, 40) and stored[SHARED[1]].shape == (24, 6)


def test_one_pair_for_all(base: Callable[[str], Base]) -> None:
    """Also where a change is found again in a file, and for each copy in another dtype."""
    change = Vera(rank=6)
    model = fresh(base("llama").path, lambda modules: dict.fromkeys(match_targets(modules, "all-linear"), change))
    model(tokens(1, 5))
    found = {id(c.projection) for _, m in adapted_modules(model) for c in m.changes.values() if isinstance(c, Vera)}
    assert len(found) == 1
    sizes = [segment.size for _, m in adapted_modules(model) for segment in m.spec.segments]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(6 + size for size in sizes)


def test_what_a_file_has_is_used(adapted: Callable[..., Adapted]) -> None:
    """Not what the key gives; and in a model that has run before, too."""
    made = adapted("llama", kind=peft.VeraConfig, r=4, target_modules=["q_proj", "o_proj"])
    model, ids = read(made), tokens(1, 7)
    before = model(ids)
    stored = load_file(made.path / WEIGHTS)
    save_file({**stored, SHARED[0]: 2 * stored[SHARED[0]]}, made.path / WEIGHTS)
    load_adapter_weights(model, made.path)
    again = read(made)
    assert torch.equal(model(ids), again(ids)) and (model(ids) - before).abs().max() > 0.01
    save_file({name: t for name, t in stored.items() if name != SHARED[1]}, made.path / WEIGHTS)
    assert f"tensor {SHARED[1]} is missing" in refused(lambda: read(made))
    save_file({**stored, SHARED[1]: torch.zeros(12, 4)}, made.path / WEIGHTS)
    assert f"tensor {SHARED[1]} has shape (12, 4)" in refused(lambda: read(made))


def test_a_wrong_rank(adapted: Callable[..., Adapted]) -> None:
    made = adapted("llama", kind=peft.VeraConfig, r=4, target_modules=["q_proj"])
    config = json.loads((made.path / CONFIG).read_text())
    (made.path / CONFIG).write_text(json.dumps({**config, "r": 5}))
    assert "has shape" in refused(lambda: read(made))
    (made.path / CONFIG).write_text(json.dumps({**config, "r": 0}))
    assert "0 is not a whole number from 1" in refused(lambda: read(made))


def test_the_start(base: Callable[[str], Base]) -> None:
    change = Vera(rank=3, d_initial=0.25)
    model = fresh(base("llama").path, lambda modules: dict.fromkeys(match_targets(modules, "v_proj"), change))
    for key, tensor in adapter_tensors(model).items():
        if key not in SHARED:
            assert tensor.unique().tolist() == [0.25 if key.endswith("d") else 0.0]


def test_another_dtype(base: Callable[[str], Base], tmp_path: Path) -> None:
    """fp32 in the file whatever the base; first used under inference mode, then in training."""
    change = Vera(rank=3)
    model = randomised(fresh(base("llama").path, lambda m: dict.fromkeys(match_targets(m, "v_proj"), change)))
    folder = saved(model, tmp_path / "adapter", base("llama").path)
    small = oarsmith.load_model(folder, dtype="bf16", device="cpu")
    with torch.inference_mode():
        small(tokens(1, 5))
    small(tokens(1, 5)).float().sum().backward()
    rewrite = adapter_rewrite(folder)
    assert load_decoder(base("llama").path, rewrite=rewrite).spec != load_decoder(base("llama").path).spec
    stored = load_file(folder / WEIGHTS)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert all(torch.equal(adapter_tensors(small)[name], tensor) for name, tensor in stored.items())


def test_the_same_key_gives_the_same_matrices() -> None:
    first, second, other = (
        Projection(4, Size(9, 7), key).pair(torch.device("cpu"), torch.float32) for key in (1, 1, 2)
    )
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert not torch.equal(first[0], other[0])
    assert first[0].abs().max() <= (6 / 7) ** 0.5 and first[1].abs().max() <= (6 / 4) ** 0.5
