"""LoKr beside PEFT and beside the Kronecker product itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lokr.layer import factorization

from oarsmith.adapters.change import Change, Sitting, Size
from oarsmith.adapters.linear import adapted_modules
from oarsmith.adapters.lokr import Lokr, two_factors
from oarsmith.adapters.peft_layout import CONFIG, adapter_tensors
from oarsmith.adapters.targets import match_targets

from .beside_peft import formula_close, read, read_by_peft, refused, same_answers_and_merge, same_gradients
from .conftest import Adapted, Base

CASES: dict[str, dict[str, Any]] = {
    "all": {"r": 2, "alpha": 3, "target_modules": "all-linear"},
    "both, by 4": {"r": 1, "alpha": 2, "decompose_both": True, "decompose_factor": 4, "target_modules": "all-linear"},
    "whole factors": {"r": 16, "alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "patterns": {
        "r": 2,
        "alpha": 4,
        "decompose_factor": 2,
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "rank_pattern": {"v_proj": 1, r"layers\.0\.mlp\.up_proj": 3},
        "alpha_pattern": {"self_attn.q_proj": 7},
    },
}


@pytest.mark.parametrize("name", CASES)
def test_peft_s(adapted: Callable[..., Adapted], name: str) -> None:
    made = adapted("llama", kind=peft.LoKrConfig, init_weights=False, **CASES[name])
    same_gradients(made, "lokr_")
    same_answers_and_merge(made)


@pytest.mark.parametrize(
    "change", [Lokr(rank=2, alpha=3.0), Lokr(rank=1, alpha=2.0, both=True, factor=4), Lokr(rank=30, alpha=30.0)]
)
def test_ours(base: Callable[[str], Base], tmp_path: Path, change: Lokr) -> None:
    read_by_peft(
        base("llama"),
        tmp_path / "adapter",
        lambda modules: dict.fromkeys(match_targets(modules, ("q_proj", "v_proj", "down_proj")), change),
        std=0.3,
    )


def test_ranks_and_factors_that_differ(base: Callable[[str], Base], tmp_path: Path) -> None:
    def choose(modules: Any) -> dict[str, Change]:
        special = dict.fromkeys(match_targets(modules, "o_proj"), Lokr(rank=1, alpha=3.0))
        return dict.fromkeys(match_targets(modules, "all-linear"), Lokr(rank=2, alpha=1.0)) | special

    read_by_peft(base("llama"), tmp_path / "adapter", choose, std=0.3)
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert {config["r"], *config["rank_pattern"].values()} == {1, 2}


@pytest.mark.parametrize("size", [Size(24, 40), Size(40, 24), Size(7, 12), Size(36, 36)])
@pytest.mark.parametrize(("rank", "both", "factor"), [(1, True, -1), (2, False, 4), (50, True, 3), (2, True, 6)])
def test_the_product(size: Size, rank: int, both: bool, factor: int) -> None:
    """x through reshapes is x through the whole matrix, in fp64, with gradients."""
    change, generator = Lokr(rank=rank, alpha=1.5 * rank, both=both, factor=factor), torch.Generator().manual_seed(1)
    tensors = {
        name: torch.randn(shape, generator=generator).requires_grad_() for name, shape in change.shapes(size).items()
    }
    x = torch.randn(2, 5, size.in_features, generator=generator).requires_grad_()
    found = change.added(Sitting(size, tensors), x, training=False)
    wide = {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}
    left, right = (
        wide[name] if name in wide else wide[f"{name}_a"] @ wide[f"{name}_b"] for name in ("lokr_w1", "lokr_w2")
    )
    rows = x.detach().double().requires_grad_()
    expected = rows @ (1.5 * torch.kron(left, right)).t()
    formula_close(found, expected)
    dout = torch.randn(found.shape, generator=generator)
    ours = torch.autograd.grad(found, [x, *tensors.values()], dout)
    theirs = torch.autograd.grad(expected, [rows, *wide.values()], dout.double())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_two_factors() -> None:
    for number in [*range(1, 200), 576, 1536, 2048, 4864, 11008]:
        for factor in (-1, *range(1, 40)):
            assert two_factors(number, factor) == factorization(number, factor), (number, factor)


def test_the_start_is_zero_in_the_small_factor(adapted: Callable[..., Adapted]) -> None:
    made = adapted("llama", kind=peft.LoKrConfig, r=2, decompose_both=True, target_modules=["q_proj"])
    model = read(made)
    for _, module in adapted_modules(model):
        module.reset(torch.Generator().manual_seed(1))
    for key, tensor in adapter_tensors(model).items():
        first = key.rsplit(".", 1)[-1] in ("lokr_w1", "lokr_w1_a")
        assert first != bool(tensor.any())
        assert first or tensor.abs().max() <= tensor.shape[1] ** -0.5


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"r": 0}, "r: 0.0 is not a whole number from 1"),
        ({"r": 2.5}, "r: 2.5 is not a whole number"),
        ({"r": "2"}, "r: '2' is not a number"),
        ({"decompose_both": 1}, "decompose_both: 1 is not true or false"),
        ({"decompose_factor": -3}, "decompose_factor: -3 is not a whole number from -1"),
        ({"alpha": None, "decompose_factor": 3}, "has shape"),
    ],
)
def test_damaged_configs(adapted: Callable[..., Adapted], changes: dict[str, Any], part: str) -> None:
    made = adapted("llama", kind=peft.LoKrConfig, r=2, target_modules=["q_proj"])
    config = json.loads((made.path / CONFIG).read_text())
    (made.path / CONFIG).write_text(json.dumps({**config, **changes}))
    assert part in refused(lambda: read(made))
