"""Steps that lose less than those of the range: the best of a few shrunken ranges, then scales fitted to the numbers.

The loss is sum_i m_i (w_i - q_i)^2 over a group; m, the importance of a column, is what its input's square is on
average (the diagonal of GPTQ's Hessian). Weights' plain error (no importance) is a poor guide: on SmolLM2-135M it made
the model worse than the range did, and the weighted one made it much better.

Shapes: O out features, I in features, G groups of a row, K columns of a group, P points of the search.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from oarsmith.kernels.integer_steps import fit_sums, shrink_losses
from oarsmith.quantize.checks import check_finite, check_weight
from oarsmith.quantize.grid import E4M3_MAX, Grid, Steps, encode, grouped, range_steps, stored

_TINY = 1e-12
_CHUNK = 1 << 17
"""Weights that are worked on at a time: with their temporaries they stay in a core's cache."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """How steps are searched.

    Attributes:
        points: shrink factors that are tried, evenly from 1 down.
        lowest: the last of them.
        refits: how often scales are then fitted to the numbers by least squares, and the numbers rounded again.
    """

    points: int = 20
    lowest: float = 0.5
    refits: int = 2


def search_steps(
    weight_OI: Tensor, grid: Grid, importance_I: Tensor | None = None, search: Search | None = None
) -> Steps:
    """Steps of least squared error, each column's error weighted with its importance; never worse than the range's.

    Args:
        importance_I: at least zero; None: all alike. Zeros count as a hundred thousandth of the mean.

    Raises:
        ModelError: for weights or an importance that are not finite.
    """
    search = Search() if search is None else search
    check_weight(weight_OI)
    weight_OI = weight_OI.float()
    root_GK = root_importance(weight_OI, grid, importance_I)
    steps = range_steps(weight_OI, grid)
    factors_P = torch.linspace(1.0, search.lowest, search.points, device=weight_OI.device)
    losses_POG = over_rows(_losses(weight_OI, steps, grid, root_GK, factors_P), grid)
    steps = Steps(scale_OG=steps.scale_OG * factors_P[losses_POG.argmin(0)], zero_OG=steps.zero_OG)
    for _ in range(search.refits):
        steps = refit_scales(weight_OI, steps, grid, root_GK)
    return stored(steps, grid)


def root_importance(weight_OI: Tensor, grid: Grid, importance_I: Tensor | None = None) -> Tensor:
    """Square roots [G, K] of the importance; what a short last group lacks weighs nothing."""
    width = weight_OI.shape[1]
    if importance_I is None:
        importance_I = weight_OI.new_ones(width)
    check_finite(importance_I, "the importance of columns")
    importance_I = importance_I.float().to(weight_OI.device)
    mean = importance_I.mean()
    importance_I = importance_I / mean if mean > 0 else torch.ones_like(importance_I)
    padded = functional.pad(importance_I.clamp_min(1e-5).sqrt(), (0, -width % grid.group_of(width)))
    return padded.unflatten(0, (-1, grid.group_of(width)))


def _losses(weight_OI: Tensor, steps: Steps, grid: Grid, root_GK: Tensor, factors_P: Tensor) -> Tensor:
    """The loss [P, O, G] of each shrink factor. Shrinking both ends of a range leaves its zero."""
    scale_OG = torch.where(steps.scale_OG.abs() < _TINY, 1.0, steps.scale_OG)
    if grid.code == "int":
        return shrink_losses(
            weight_OI,
            scale_OG,
            steps.zero_OG,
            root_GK.flatten()[: weight_OI.shape[1]].square(),
            factors_P,
            group=grid.group_of(weight_OI.shape[1]),
            middle=grid.middle,
            largest=grid.largest,
        )
    losses_POG = scale_OG.new_empty(len(factors_P), *scale_OG.shape)
    rows = max(1, _CHUNK // weight_OI.shape[1])
    for start in range(0, len(weight_OI), rows):
        part = slice(start, start + rows)
        units_OGK = grouped(weight_OI[part], grid) / scale_OG[part][..., None]
        for number, factor in enumerate(factors_P.tolist()):
            exact_OGK = units_OGK / factor
            near_OGK = exact_OGK.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()
            lost_OG = torch.linalg.vector_norm(exact_OGK.sub_(near_OGK).mul_(root_GK), dim=-1)
            losses_POG[number, part] = (lost_OG * factor * scale_OG[part]).square_()
    return losses_POG


def over_rows(losses_POG: Tensor, grid: Grid) -> Tensor:
    """The loss of all rows that share a scale, beside each of them."""
    if grid.rows == 1:
        return losses_POG
    num_rows = losses_POG.shape[1]
    rows = num_rows if grid.rows is None else grid.rows
    padded = functional.pad(losses_POG, (0, 0, 0, -num_rows % rows))
    return padded.unflatten(1, (-1, rows)).sum(2).repeat_interleave(rows, 1)[:, :num_rows]


def refit_scales(weight_OI: Tensor, steps: Steps, grid: Grid, root_GK: Tensor) -> Steps:
    """Scales of least loss for the numbers that the weights have on these steps: <m w n> / <m n n>."""
    scale_OG = torch.where(steps.scale_OG.abs() < _TINY, 1.0, steps.scale_OG)
    group = grid.group_of(weight_OI.shape[1])
    if grid.code == "int":
        importance_I = root_GK.flatten()[: weight_OI.shape[1]].square()
        products_OG, squares_OG = fit_sums(
            weight_OI,
            scale_OG,
            steps.zero_OG,
            importance_I,
            group=group,
            middle=grid.middle,
            largest=grid.largest,
        )
    else:
        scale_OI, _ = steps.columns(0, weight_OI.shape[1], group)
        numbers_OGK = grouped(encode(weight_OI, scale_OI, None, grid).float(), grid) * root_GK
        products_OG = torch.linalg.vecdot(grouped(weight_OI, grid) * root_GK, numbers_OGK)
        squares_OG = torch.linalg.vecdot(numbers_OGK, numbers_OGK)
    squares_OG = over_rows(squares_OG[None], grid)[0]
    fitted_OG = over_rows(products_OG[None], grid)[0] / squares_OG.clamp_min(_TINY)
    # Nothing on the grid, or what was fitted to noise: the scale stays.
    keep_OG = (squares_OG < _TINY) | (fitted_OG.abs() < _TINY) | (fitted_OG.sign() != steps.scale_OG.sign())
    return stored(Steps(scale_OG=torch.where(keep_OG, steps.scale_OG, fitted_OG), zero_OG=steps.zero_OG), grid)
