"""Keys and values in 8 bits are the nearest steps of their groups, and damage stays in its group."""

from __future__ import annotations

import pytest
import torch

from oarsmith.models.cache_form import GROUP, INT8_GROUPS, CacheForm
from oarsmith.models.rounded_slots import FloatSlots, GroupedSlots, IntegerSlots


@pytest.mark.parametrize("dim", [16, 32, 80, 128])
def test_half_a_step_is_lost(dim: int) -> None:
    slots, x_TK = GroupedSlots(20, (3, dim), torch.device("cpu")), torch.randn(6, 3, dim) * 5
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
    slots, x_TK = GroupedSlots(2, (64,), torch.device("cpu")), torch.ones(2, 64)
    x_TK[0, 40] = bad
    slots.write(torch.tensor([0, 1]), x_TK)
    found = slots.read(torch.tensor([0, 1]), torch.float32)
    assert found[0, 32:].isnan().all()
    assert not found[0, :32].isnan().any() and not found[1].isnan().any()


def test_memory() -> None:
    assert [INT8_GROUPS.num_bytes(dim) for dim in (16, 64, 80)] == [18, 68, 86]
    assert [CacheForm(code="e4m3").num_bytes(dim) for dim in (16, 64, 80)] == [16, 64, 80]


@pytest.mark.parametrize("kind", [IntegerSlots, FloatSlots])
@pytest.mark.parametrize("scales", [(0.03,), (0.03, 0.01, 0.2)])
def test_scales_of_heads(kind: type[IntegerSlots | FloatSlots], scales: tuple[float, ...]) -> None:
    """Half a step is lost, of E4M3 half of its three bits of fraction; what lies outside becomes the largest."""
    most = 127 if kind is IntegerSlots else 448
    slots, x_TK = kind(9, (3, 32), torch.device("cpu"), scales), torch.randn(4, 3, 32)
    scale = torch.tensor(scales).expand(3)[:, None]
    x_TK[0, 1, 5], x_TK[1, 2, 7] = 1e6, torch.nan
    where = torch.tensor([4, 2, 0, 7])
    slots.write(where, x_TK)
    found = slots.read(where, torch.float32)
    assert found[1, 2, 7].isnan() and int(found.isnan().sum()) == 1
    own = x_TK.clamp(-most * scale, most * scale)
    step = scale / 2 if kind is IntegerSlots else own.abs() / 16 + scale * 2**-10
    error = (found - own).abs()
    error[1, 2, 7] = 0
    assert bool((error <= step.nan_to_num() * 1.0001).all())
