"""HQQ: what its norm is after, its threshold by hand, and whole zeros."""

from __future__ import annotations

import pytest
import torch

from oarsmith.errors import ConfigError, ModelError
from oarsmith.quantize.grid import Grid, quantize
from oarsmith.quantize.hqq import HQQ, hqq_steps, shrink, with_whole_zeros


def weights(out: int = 32, width: int = 128) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(out, width, generator=generator) / 10 + 0.03


@pytest.mark.parametrize("grid", [Grid(group=64), Grid(group=50), Grid(group=None, bits=3), Grid(group=32, bits=2)])
def test_less_of_its_norm_is_lost(grid: Grid) -> None:
    weight = weights()

    def norm(dense: torch.Tensor) -> float:
        return float((dense - weight).abs().pow(0.7).mean())

    steps = hqq_steps(weight, grid)
    assert norm(quantize(weight, grid, steps).dense()) < 0.97 * norm(quantize(weight, grid).dense())
    # The zero of no turn is the range's own.
    low = weight[:, : grid.group_of(128)].amin(1)
    first = hqq_steps(weight, grid, HQQ(turns=0))
    assert first.zero_OG is not None
    torch.testing.assert_close(first.zero_OG[:, 0], -low / first.scale_OG[:, 0])


def test_the_zero_of_a_turn_is_a_mean() -> None:
    # beta so large that nothing is shrunk away leaves the zero; one so small that all is makes it mean(n - w / s).
    weight = weights(3, 16)
    grid = Grid(group=None, bits=2)
    start = hqq_steps(weight, grid, HQQ(turns=0))
    assert start.zero_OG is not None
    units = weight / start.scale_OG
    numbers = (units + start.zero_OG).round().clamp(0, 3)
    mean = (numbers - units).mean(1, keepdim=True)
    found = hqq_steps(weight, grid, HQQ(turns=1, beta=1e-3, norm=1.0))
    assert found.zero_OG is not None
    lost_start = (quantize(weight, grid, start).dense() - weight).abs().sum(1)
    lost_mean = ((units + mean).round().clamp(0, 3) - mean - units).mul(start.scale_OG).abs().sum(1)
    expected = torch.where(lost_mean < lost_start, mean[:, 0], start.zero_OG[:, 0])
    torch.testing.assert_close(found.zero_OG[:, 0], expected)
    kept = hqq_steps(weight, grid, HQQ(turns=5, beta=1e9))
    torch.testing.assert_close(kept.zero_OG, start.zero_OG, rtol=1e-4, atol=1e-4)


def test_the_threshold_by_hand() -> None:
    # 4 - 4^-.5 / 2 = 3.75, and 0.1 - 0.1^-.5 / 2 < 0.
    found = shrink(torch.tensor([4.0, -4.0, 0.1, 0.0]), 2.0, 0.5)
    assert found.tolist() == pytest.approx([3.75, -3.75, 0.0, 0.0])


def test_whole_zeros() -> None:
    weight, grid = weights(), Grid(group=32)
    steps = hqq_steps(weight, grid)
    whole = with_whole_zeros(weight, steps, grid)
    assert steps.zero_OG is not None and whole.zero_OG is not None
    assert not torch.equal(steps.zero_OG, steps.zero_OG.round())
    assert torch.equal(whole.zero_OG, steps.zero_OG.round())
    rounded = quantize(weight, grid, whole).dense()
    unfitted = quantize(weight, grid, type(steps)(scale_OG=steps.scale_OG, zero_OG=whole.zero_OG)).dense()
    assert (rounded - weight).square().sum() < (unfitted - weight).square().sum()
    assert (rounded - weight).square().sum() < (quantize(weight, grid).dense() - weight).square().sum()


def test_groups_of_one_number() -> None:
    weight = weights(4, 8)
    weight[0], weight[1], weight[2] = 0.0, 0.25, -0.25
    steps = hqq_steps(weight, Grid(group=4))
    dense = quantize(weight, Grid(group=4), steps).dense()
    assert dense[:3].tolist() == weight[:3].tolist()
    column = torch.tensor([[0.5], [-3.0]])
    assert quantize(column, Grid(), hqq_steps(column, Grid())).dense().tolist() == column.tolist()


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="use an asymmetric grid"):
        hqq_steps(weights(), Grid(symmetric=True))
    with pytest.raises(ModelError, match="a weight: 4096 of 4096"):
        hqq_steps(weights() * torch.nan, Grid())
