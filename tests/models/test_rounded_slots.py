"""Keys and values in 8 bits are the nearest steps of their groups, and damage stays in its group."""

from __future__ import annotations

import pytest
import torch

from oarsmith.models.rounded_slots import GROUP, RoundedSlots, rounded_bytes


@pytest.mark.parametrize("dim", [16, 32, 80, 128])
def test_half_a_step_is_lost(dim: int) -> None:
    slots, x_TK = RoundedSlots(20, (3, dim), torch.device("cpu")), torch.randn(6, 3, dim) * 5
    x_TK[0, 0] = 0
    where = torch.tensor([4, 2, 19, 0, 7, 8])
    slots.write(where, x_TK)
    found = slots.read(where, torch.float32)
    for first in range(0, dim, GROUP):
        own, got = x_TK[..., first : first + GROUP], found[..., first : first + GROUP]
        # The scale is rounded to fp16.
        assert ((got - own).abs() <= own.abs().amax(-1, keepdim=True) * (0.5 / 127 + 2.0**-11)).all()
    assert torch.equal(found[0, 0], torch.zeros(dim))
    slots.copy(slice(0, 5), slice(10, 15))
    assert torch.equal(slots.read(torch.tensor([14, 12]), torch.float32), found[:2])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_becomes_nan_in_its_group(bad: float) -> None:
    slots, x_TK = RoundedSlots(2, (64,), torch.device("cpu")), torch.ones(2, 64)
    x_TK[0, 40] = bad
    slots.write(torch.tensor([0, 1]), x_TK)
    found = slots.read(torch.tensor([0, 1]), torch.float32)
    assert found[0, 32:].isnan().all()
    assert not found[0, :32].isnan().any() and not found[1].isnan().any()


def test_memory() -> None:
    assert [rounded_bytes(dim) for dim in (16, 64, 80)] == [18, 68, 86]
