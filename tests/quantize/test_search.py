"""Searched steps beside brute force, and where they must not go wrong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from oarsmith.errors import ModelError
from oarsmith.quantize.grid import Grid, Steps, quantize, range_steps
from oarsmith.quantize.search import Search, search_steps

GRIDS = {
    "asymmetric": Grid(group=16),
    "symmetric": Grid(group=16, symmetric=True),
    "two bits": Grid(group=16, bits=2),
    "int8": Grid(group=None, bits=8, symmetric=True),
    "e4m3": Grid(code="e4m3", bits=8, group=None),
    "e4m3 blocks": Grid(code="e4m3", bits=8, group=16, rows=4),
    "e4m3 tensor": Grid(code="e4m3", bits=8, group=None, rows=None),
    "not dividing": Grid(group=20),
    "one column a group": Grid(group=1),
}


def weights(out: int = 10, width: int = 48) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    # Heavy tails: there is something to clip.
    return torch.randn(out, width, generator=generator) ** 3 / 10


def importance(width: int = 48) -> Tensor:
    return torch.rand(width, generator=torch.Generator().manual_seed(1)).mul(4).exp()


def loss(weight_OI: Tensor, grid: Grid, steps: Steps, importance_I: Tensor) -> Tensor:
    """Of each group of columns and block of rows, from the dense weight."""
    lost_OI = (quantize(weight_OI, grid, steps).dense() - weight_OI).double().square() * importance_I
    rows, group = grid.rows or len(weight_OI), grid.group_of(weight_OI.shape[1])
    blocks = [part.sum() for some in lost_OI.split(rows, 0) for part in some.split(group, 1)]
    return torch.stack(blocks)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_best_of_all_factors(grid: Grid, weighted: bool) -> None:
    weight, counts = weights(), importance() if weighted else torch.ones(48)
    search = Search(points=9, lowest=0.4, refits=0)
    found = search_steps(weight, grid, counts if weighted else None, search)
    every = []
    for factor in torch.linspace(1, 0.4, 9):
        before = range_steps(weight, grid)
        every.append(loss(weight, grid, Steps(scale_OG=before.scale_OG * factor, zero_OG=before.zero_OG), counts))
    best = torch.stack(every).amin(0)
    torch.testing.assert_close(loss(weight, grid, found, counts), best, rtol=1e-4, atol=1e-9)
    fitted = search_steps(weight, grid, counts, Search(points=9, lowest=0.4, refits=2))
    after = loss(weight, grid, fitted, counts)
    assert (after <= best * (1 + 1e-4) + 1e-9).all()
    if grid.group != 1:
        assert after.sum() < best.sum()


def test_a_fitted_scale_by_hand() -> None:
    # On the range's step of 7/7 the numbers of 7, 1.2, -2.4 are 15, 9, 6: 7, 1, -2 after the zero 8, and
    # <w n> / <n n> = (49 + 1.2 + 4.8) / (49 + 1 + 4) = 55 / 54.
    weight = torch.tensor([[7.0, 1.2, -2.4, -8.0]])
    grid = Grid(group=4, symmetric=True)
    kept = search_steps(weight, grid, torch.tensor([1.0, 1.0, 1.0, 0.0]), Search(points=1, refits=1))
    # The last column, without importance, hardly counts.
    assert float(kept.scale_OG) == pytest.approx(55 / 54, abs=1e-3)


def test_weighting_serves_the_outputs() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(200, 48, generator=generator) * importance().sqrt()
    weight, grid = weights(64), Grid(group=16)

    def lost(steps: Steps) -> float:
        return float(((quantize(weight, grid, steps).dense() - weight) @ x.T).square().sum())

    weighted = lost(search_steps(weight, grid, x.square().mean(0)))
    assert weighted < lost(search_steps(weight, grid))
    assert weighted < 0.9 * lost(range_steps(weight, grid))


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_rows_of_zeros_and_columns_without_importance(grid: Grid) -> None:
    weight, counts = weights(), importance()
    weight[3] = 0
    counts[:16] = 0
    steps = search_steps(weight, grid, counts)
    assert torch.isfinite(steps.scale_OG).all()
    dense = quantize(weight, grid, steps).dense()
    assert torch.equal(dense[3], torch.zeros(48))
    # Those without importance are cut where that serves the others, but by half at most: a quarter of the squares.
    assert (dense - weight)[:, :16].square().sum() < 0.27 * weight[:, :16].square().sum()
    nothing = search_steps(weight, grid, torch.zeros(48))
    assert torch.equal(nothing.scale_OG, search_steps(weight, grid).scale_OG)


def test_one_column_and_no_row() -> None:
    steps = search_steps(torch.tensor([[-0.7], [0.3]]), Grid())
    assert quantize(torch.tensor([[-0.7], [0.3]]), Grid(), steps).dense().flatten().tolist() == pytest.approx(
        [-0.7, 0.3]
    )
    assert search_steps(torch.zeros(0, 8), Grid()).scale_OG.shape == (0, 1)


def test_what_is_refused() -> None:
    weight, counts = weights(), importance()
    counts[2] = torch.nan
    with pytest.raises(ModelError, match="the importance of columns: 1 of 48"):
        search_steps(weight, Grid(), counts)
    weight[0, 0] = -torch.inf
    with pytest.raises(ModelError, match=r"a weight: 1 of 480 numbers(.|\n)*fix: check the model in floats"):
        search_steps(weight, Grid())
    with pytest.raises(ModelError, match="no matrix"):
        search_steps(torch.zeros(3, 0), Grid())
