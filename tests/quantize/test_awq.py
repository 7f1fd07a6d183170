"""AWQ's searches beside the errors of real outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from oarsmith.errors import ModelError
from oarsmith.quantize.awq import AWQ, awq_factors, clip_steps
from oarsmith.quantize.grid import Grid, Steps, quantize, range_steps

GRIDS = {"asymmetric": Grid(group=16), "symmetric": Grid(group=16, symmetric=True), "not dividing": Grid(group=20)}


def inputs(width: int = 48) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    # A few channels are much larger than the others.
    return torch.randn(300, width, generator=generator) * torch.rand(width, generator=generator).mul(4).exp()


def weights(out: int, seed: int, width: int = 48) -> Tensor:
    return torch.randn(out, width, generator=torch.Generator().manual_seed(seed)) / 10


def gram(x_TI: Tensor) -> Tensor:
    return x_TI.T @ x_TI / len(x_TI)


def share_lost(x_TI: Tensor, weights_of: list[Tensor], factor_I: Tensor, grid: Grid) -> float:
    lost = whole = 0.0
    for weight in weights_of:
        out = (x_TI / factor_I) @ quantize(weight * factor_I, grid).dense().T
        lost += float((out - x_TI @ weight.T).square().sum())
        whole += float((x_TI @ weight.T).square().sum())
    return lost / whole


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_factors_serve_the_outputs(grid: Grid) -> None:
    x, maps = inputs(), [weights(24, 1), weights(40, 2)]
    found = awq_factors(maps, x.abs().mean(0), gram(x), grid, AWQ(rows=None))
    assert found.before == pytest.approx(share_lost(x, maps, torch.ones(48), grid), rel=1e-3)
    assert found.error == pytest.approx(share_lost(x, maps, found.factor_I, grid), rel=1e-3)
    assert found.error < 0.7 * found.before
    # The largest channels are scaled up against the smallest.
    size = x.abs().mean(0)
    assert found.factor_I[size.argmax()] > found.factor_I[size.argmin()]


def test_the_best_of_the_papers_candidates() -> None:
    x, weight, grid = inputs(), weights(24, 1), Grid(group=16)
    size = x.abs().mean(0)
    share = (weight.abs().unflatten(1, (3, 16)) / weight.abs().unflatten(1, (3, 16)).amax(-1, keepdim=True)).flatten(1)
    every = []
    for point in range(20):
        ratio = point / 20
        for factor in (size**ratio, size**ratio / share.mean(0) ** (1 - ratio)):
            every.append(share_lost(x, [weight], factor / (factor.max() * factor.min()).sqrt(), grid))
    both = awq_factors([weight], size, gram(x), grid).error
    assert both == pytest.approx(min(every), rel=0.02)
    assert awq_factors([weight], size, gram(x), grid, AWQ(with_weights=False)).error == pytest.approx(
        min(every[::2]), rel=0.02
    )


def test_some_rows_stand_for_all() -> None:
    x, weight, grid = inputs(), weights(600, 1), Grid(group=16)
    some = awq_factors([weight], x.abs().mean(0), gram(x), grid, AWQ(rows=100))
    every = awq_factors([weight], x.abs().mean(0), gram(x), grid, AWQ(rows=None))
    assert share_lost(x, [weight], some.factor_I, grid) == pytest.approx(every.error, rel=0.05)


def test_channels_that_are_tied() -> None:
    x, weight = inputs(), weights(24, 1)

    def pairs(factor_I: Tensor) -> Tensor:
        return factor_I.unflatten(0, (-1, 2)).amax(1).repeat_interleave(2)

    found = awq_factors([weight], x.abs().mean(0), gram(x), Grid(group=16), tie=pairs)
    assert torch.equal(found.factor_I[::2], found.factor_I[1::2])
    assert found.error < found.before


def test_silent_channels() -> None:
    x, weight = inputs(), weights(24, 1)
    x[:, 5] = 0
    weight[:, 7] = 0
    found = awq_factors([weight], x.abs().mean(0), gram(x), Grid(group=16))
    assert torch.isfinite(found.factor_I).all() and (found.factor_I > 0).all()
    nothing = awq_factors([weight], torch.zeros(48), torch.zeros(48, 48), Grid(group=16))
    assert torch.equal(nothing.factor_I, torch.ones(48)) and nothing.error == 0


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_clipping_by_each_groups_part_of_the_output(grid: Grid) -> None:
    x, weight = inputs(), weights(12, 3) ** 3 * 100
    found = clip_steps(weight, gram(x), grid)
    group, row = grid.group_of(48), Grid(group=None, symmetric=grid.symmetric)
    for start in range(0, 48, group):
        own = slice(start, start + group)
        part, outputs = weight[:, own], []
        for point in range(10):
            most = part.abs().amax(1, keepdim=True) * (1 - point / 20)
            steps = range_steps(torch.minimum(torch.maximum(part, -most), most), row)
            dense = quantize(part, row, steps).dense()
            outputs.append(((dense - part) @ x[:, own].T).square().sum(1))
        dense = quantize(weight, grid, found).dense()
        lost = ((dense - weight)[:, own] @ x[:, own].T).square().sum(1)
        torch.testing.assert_close(lost, torch.stack(outputs).amin(0), rtol=1e-3, atol=1e-6)


def test_clipping_rows_that_share_a_scale() -> None:
    x, weight = inputs(), weights(12, 3) ** 3 * 100
    grid = Grid(code="e4m3", bits=8, group=16, rows=4)
    steps = clip_steps(weight, gram(x), grid)
    assert torch.equal(steps.scale_OG[:4], steps.scale_OG[:1].expand(4, -1))

    def lost(steps: Steps) -> float:
        lost_OI = quantize(weight, grid, steps).dense() - weight
        return sum(float((lost_OI[:, s : s + 16] @ x[:, s : s + 16].T).square().sum()) for s in (0, 16, 32))

    assert lost(steps) <= lost(range_steps(weight, grid))


def test_what_is_refused() -> None:
    weight = weights(4, 1)
    with pytest.raises(ModelError, match="the Gram matrix of inputs: 2304 of 2304"):
        awq_factors([weight], torch.ones(48), torch.full((48, 48), torch.nan), Grid())
    with pytest.raises(ModelError, match="the mean of inputs"):
        awq_factors([weight], torch.full((48,), torch.inf), torch.ones(48, 48), Grid())
    with pytest.raises(ModelError, match="a weight"):
        clip_steps(weight * torch.nan, torch.ones(48, 48), Grid())
