"""LoHa beside PEFT and its formula, through either of its two ways."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from oarsmith.adapters.change import Change, Sitting, Size
from oarsmith.adapters.loha import Loha
from oarsmith.adapters.targets import match_targets

from .beside_peft import formula_close, read_by_peft, same_answers_and_merge, same_gradients
from .conftest import Adapted, Base

CASES: dict[str, dict[str, Any]] = {
    "all": {"r": 2, "alpha": 3, "target_modules": "all-linear"},
    "high rank": {"r": 6, "alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "patterns": {
        "r": 2,
        "alpha": 4,
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"v_proj": 4},
        "alpha_pattern": {"q_proj": 1},
    },
}


@pytest.mark.parametrize("name", CASES)
def test_peft_s(adapted: Callable[..., Adapted], name: str) -> None:
    made = adapted("llama", kind=peft.LoHaConfig, init_weights=False, **CASES[name])
    same_gradients(made, "hada_")
    same_answers_and_merge(made)


def test_ours(base: Callable[[str], Base], tmp_path: Path) -> None:
    def choose(modules: Any) -> dict[str, Change]:
        special = dict.fromkeys(match_targets(modules, "o_proj"), Loha(rank=5, alpha=3.0))
        return dict.fromkeys(match_targets(modules, "all-linear"), Loha(rank=2, alpha=1.0)) | special

    read_by_peft(base("llama"), tmp_path / "adapter", choose, std=0.3)


@pytest.mark.parametrize("rank", [1, 3, 4, 7])
def test_the_formula(rank: int) -> None:
    """Widths of 24 and 40: through products up to rank 3, through the matrix from 4 on."""
    size, change, generator = Size(24, 40), Loha(rank=rank, alpha=2.0 * rank), torch.Generator().manual_seed(1)
    tensors = {
        name: torch.randn(shape, generator=generator).requires_grad_() for name, shape in change.shapes(size).items()
    }
    x = torch.randn(3, 40, generator=generator).requires_grad_()
    found = change.added(Sitting(size, tensors), x, training=False)
    assert found is not None
    wide = {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}
    rows = x.detach().double().requires_grad_()
    delta = 2 * (wide["hada_w1_a"] @ wide["hada_w1_b"]) * (wide["hada_w2_a"] @ wide["hada_w2_b"])
    expected = rows @ delta.t()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
    formula_close(change.delta(Sitting(size, tensors)), delta)
    dout = torch.randn(found.shape, generator=generator)
    ours = torch.autograd.grad(found, [x, *tensors.values()], dout)
    theirs = torch.autograd.grad(expected, [rows, *wide.values()], dout.double())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-3)
