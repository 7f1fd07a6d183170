"""AutoRound: less is lost of a block's outputs, by offsets and ranges within their bounds."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from oarsmith.errors import ConfigError, DataError, ModelError
from oarsmith.quantize.autoround import AutoRound, autoround
from oarsmith.quantize.grid import Grid, quantize, range_steps

GRIDS = {
    "asymmetric": Grid(group=16, bits=3),
    "symmetric": Grid(group=16, bits=3, symmetric=True),
    "row of 2 bits": Grid(group=None, bits=2),
    "not dividing": Grid(group=20, bits=3),
    "int8": Grid(group=None, bits=8, symmetric=True),
}


class Case:
    """A small network of two maps, and batches for it."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weights = {
            "up": torch.randn(40, 48, generator=generator) / 7,
            "down": torch.randn(24, 40, generator=generator) / 6,
        }
        mix = torch.randn(48, 48, generator=generator) / 5
        self.batches = [torch.randn(size, 48, generator=generator) @ mix for size in (30, 17, 64)]
        self.targets = [self.block(self.weights, number) for number in range(3)]

    def block(self, weights: Mapping[str, Tensor], number: int) -> Tensor:
        return functional.silu(self.batches[number] @ weights["up"].T) @ weights["down"].T

    def lost(self, weights: Mapping[str, Tensor]) -> float:
        lost = [(self.block(weights, number) - target).square() for number, target in enumerate(self.targets)]
        return float(torch.cat([one.flatten() for one in lost]).mean())


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_less_is_lost(grid: Grid) -> None:
    case = Case()
    found = autoround(case.block, case.weights, case.targets, dict.fromkeys(case.weights, grid), AutoRound(steps=60))
    nearest = {name: quantize(weight, grid).dense() for name, weight in case.weights.items()}
    assert found.before == pytest.approx(case.lost(nearest), rel=1e-3)
    dense = {name: one.dense() for name, one in found.quantized.items()}
    assert found.after == pytest.approx(case.lost(dense), rel=1e-3)
    assert found.after < 0.8 * found.before
    for name, one in found.quantized.items():
        assert one.numbers_OI.dtype is torch.uint8 and int(one.numbers_OI.max()) <= grid.largest
        assert (one.steps.zero_OG is None) == grid.symmetric
        before = range_steps(case.weights[name], grid)
        assert (one.steps.scale_OG.abs() <= before.scale_OG.abs() * (1 + 1e-5)).all()


def test_offsets_alone_move_a_number_by_one() -> None:
    case, grid = Case(), Grid(group=16, bits=3)
    settings = AutoRound(steps=40, learn_range=False)
    found = autoround(case.block, case.weights, case.targets, dict.fromkeys(case.weights, grid), settings)
    for name, one in found.quantized.items():
        nearest = quantize(case.weights[name], grid)
        torch.testing.assert_close(one.steps.scale_OG, nearest.steps.scale_OG)
        assert int((one.numbers_OI.int() - nearest.numbers_OI.int()).abs().max()) == 1
    assert found.after < found.before


def test_the_same_again() -> None:
    case, grids = Case(), dict.fromkeys(("up", "down"), Grid(group=16))
    first, second = (
        autoround(case.block, case.weights, case.targets, grids, AutoRound(steps=5, batches=2)) for _ in range(2)
    )
    assert torch.equal(first.quantized["up"].numbers_OI, second.quantized["up"].numbers_OI)
    assert first.after == second.after


def test_never_worse_than_nearest() -> None:
    case, grids = Case(), dict.fromkeys(("up", "down"), Grid(group=16))
    # A rate that throws everything about.
    found = autoround(case.block, case.weights, case.targets, grids, AutoRound(steps=2, rate=5.0, batches=1))
    assert found.after <= found.before
    none = autoround(case.block, case.weights, case.targets, grids, AutoRound(steps=0, rate=1.0))
    assert none.after == none.before
    assert torch.equal(none.quantized["up"].dense(), quantize(case.weights["up"], Grid(group=16)).dense())


def test_maps_without_tokens_and_rows_of_zeros() -> None:
    case, grids = Case(), dict.fromkeys(("up", "down", "expert"), Grid(group=16))
    case.weights["up"][3] = 0
    case.targets = [case.block(case.weights, number) for number in range(3)]
    expert = case.weights["down"] * 2
    weights = case.weights | {"expert": expert}
    found = autoround(case.block, weights, case.targets, grids, AutoRound(steps=10))
    torch.testing.assert_close(found.quantized["expert"].dense(), quantize(expert, Grid(group=16)).dense())
    assert torch.isfinite(found.quantized["up"].dense()).all()


def test_what_is_refused() -> None:
    case = Case()
    with pytest.raises(ConfigError, match=r"up: AutoRound learns(.|\n)*use an integer grid"):
        autoround(case.block, case.weights, case.targets, dict.fromkeys(case.weights, Grid(code="e4m3", bits=8)))
    with pytest.raises(DataError, match="no batch"):
        autoround(case.block, case.weights, [], dict.fromkeys(case.weights, Grid()))
    with pytest.raises(ModelError, match="a target: 1 of"):
        case.targets[0][0, 0] = torch.inf
        autoround(case.block, case.weights, case.targets, dict.fromkeys(case.weights, Grid()))
