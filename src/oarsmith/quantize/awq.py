"""AWQ: input channels that matter are scaled up before weights are rounded, and groups are clipped.

Lin et al. 2023 (arXiv 2306.00978), section 3.2 and the authors' code. Errors are those of the outputs,
||(Q(W s) / s - W) X||^2 = tr(D H D^T), exactly, from the Gram matrix H = X^T X / T instead of the inputs.

Shapes: O out features, I in features, G groups of a row, K columns of a group, P points of the search.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from oarsmith.quantize.checks import check_finite, check_weight
from oarsmith.quantize.grid import Grid, Steps, grouped, quantize, range_steps
from oarsmith.quantize.search import over_rows

_SMALLEST = 1e-4
_CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class AWQ:
    """How AWQ searches.

    Attributes:
        points: exponents that are tried, from 0 up to below 1.
        with_weights: whether factors that take the weights' size into account are tried too (the authors'
            ``duo_scaling``).
        rows: of each weight, spread evenly, that are looked at; None: all. An error is a sum over rows, and for one
            factor a channel some of them say the same as all: on SmolLM2-135M 128 chose what 512 did in three maps of
            four, and lost 0.2 % more in the fourth.
        clip_points: thresholds that are tried for each group.
        most_clipped: by which share of a group's largest weight at most.
    """

    points: int = 20
    with_weights: bool = True
    rows: int | None = 256
    clip_points: int = 20
    most_clipped: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Factors:
    """What the search found: factors [I] for the weights' columns, by which the inputs are divided; the squared error
    of the outputs with them, and without, as a share of the outputs' squares."""

    factor_I: Tensor
    error: float
    before: float


@torch.no_grad()
def awq_factors(
    weights: Sequence[Tensor],
    mean_I: Tensor,
    gram_II: Tensor,
    grid: Grid,
    settings: AWQ | None = None,
    tie: Callable[[Tensor], Tensor] | None = None,
) -> Factors:
    """The best factors for maps that read one input.

    Args:
        weights: of the maps [O, I].
        mean_I: the mean of |x| over tokens.
        gram_II: the mean of x x^T.
        tie: what makes channels agree that can only have one factor; it is given candidates.

    Raises:
        ModelError: for numbers that are not finite.
    """
    settings = AWQ() if settings is None else settings
    for weight_OI in weights:
        check_weight(weight_OI)
    check_finite(mean_I, "the mean of inputs")
    check_finite(gram_II, "the Gram matrix of inputs")
    rows = torch.cat([_spread(weight_OI.float(), settings.rows) for weight_OI in weights])
    share_I = _share(weights, grid)
    whole = float(((rows @ gram_II) * rows).sum())
    before = _error(rows, gram_II, grid, torch.ones_like(mean_I))
    best, least = torch.ones_like(mean_I), before
    for factor_I in _candidates(mean_I.float(), share_I, settings):
        tied_I = factor_I if tie is None else tie(factor_I)
        error = _error(rows, gram_II, grid, tied_I)
        if error < least:
            best, least = tied_I, error
    return Factors(factor_I=best, error=least / whole if whole else 0.0, before=before / whole if whole else 0.0)


def _spread(weight_OI: Tensor, rows: int | None) -> Tensor:
    if rows is None or len(weight_OI) <= rows:
        return weight_OI
    return weight_OI[torch.arange(rows) * len(weight_OI) // rows]


def _share(weights: Sequence[Tensor], grid: Grid) -> Tensor:
    """The mean over rows of |w| / the largest of its group, for each column."""
    size, num_rows = weights[0].shape[1], sum(len(weight_OI) for weight_OI in weights)
    share_I = torch.zeros(size)
    for weight_OI in weights:
        group_OGK = grouped(weight_OI.float().abs(), grid)
        share_OGK = group_OGK / (group_OGK.amax(-1, keepdim=True) + 1e-6)
        share_I += share_OGK.sum(0).flatten()[:size] / num_rows
    return share_I


def _candidates(mean_I: Tensor, share_I: Tensor, settings: AWQ) -> list[Tensor]:
    found: list[Tensor] = []
    for point in range(1, settings.points):
        ratio = point / settings.points
        found.append(_even(mean_I.pow(ratio)))
        if settings.with_weights:
            found.append(_even(mean_I.pow(ratio) / (share_I.pow(1 - ratio) + _SMALLEST)))
    if settings.with_weights:
        found.append(_even(1 / (share_I + _SMALLEST)))
    return found


def _even(factor_I: Tensor) -> Tensor:
    """Factors around 1, none so small that a channel without input would be blown up."""
    factor_I = factor_I.clamp_min(_SMALLEST)
    return factor_I / (factor_I.amax() * factor_I.amin()).sqrt()


def _error(weight_OI: Tensor, gram_II: Tensor, grid: Grid, factor_I: Tensor) -> float:
    lost_OI = quantize(weight_OI * factor_I, grid).dense() / factor_I - weight_OI
    return float(((lost_OI @ gram_II) * lost_OI).sum())


@torch.no_grad()
def clip_steps(weight_OI: Tensor, gram_II: Tensor, grid: Grid, settings: AWQ | None = None) -> Steps:
    """Steps of clipped groups: |w| is cut where the group's own part of the output then loses least.

    Args:
        gram_II: the mean of x x^T.

    Raises:
        ModelError: for numbers that are not finite.
    """
    settings = AWQ() if settings is None else settings
    check_weight(weight_OI)
    check_finite(gram_II, "the Gram matrix of inputs")
    size, group = weight_OI.shape[1], grid.group_of(weight_OI.shape[1])
    blocks = [gram_II[start : start + group, start : start + group] for start in range(0, size, group)]
    gram_GKK = torch.stack([functional.pad(one, (0, group - len(one), 0, group - len(one))) for one in blocks])
    scales, zeros = [], []
    # Rows that share a scale are clipped together.
    rows = len(weight_OI) if grid.rows is None else max(1, _CHUNK // size // grid.rows) * grid.rows
    for start in range(0, len(weight_OI), rows):
        steps = _clipped(weight_OI[start : start + rows].float(), gram_GKK, grid, settings)
        scales.append(steps.scale_OG)
        zeros.append(steps.zero_OG)
    zero_OG = None if zeros[0] is None else torch.cat([zero for zero in zeros if zero is not None])
    return Steps(scale_OG=torch.cat(scales), zero_OG=zero_OG)


def _clipped(weight_OI: Tensor, gram_GKK: Tensor, grid: Grid, settings: AWQ) -> Steps:
    most_OG1 = grouped(weight_OI.abs(), grid).amax(-1, keepdim=True)
    best = range_steps(weight_OI, grid)
    least_OG = torch.full_like(best.scale_OG, torch.inf)
    for point in range(max(1, int(settings.most_clipped * settings.clip_points))):
        limit_OI = (most_OG1 * (1 - point / settings.clip_points)).expand(-1, -1, grid.group_of(weight_OI.shape[1]))
        limit_OI = limit_OI.flatten(1)[:, : weight_OI.shape[1]]
        steps = range_steps(torch.minimum(torch.maximum(weight_OI, -limit_OI), limit_OI), grid)
        lost_OGK = grouped(quantize(weight_OI, grid, steps).dense() - weight_OI, grid)
        error_OG = torch.einsum("ogk,gkl,ogl->og", lost_OGK, gram_GKK, lost_OGK)
        error_OG = over_rows(error_OG[None], grid)[0]
        better_OG = error_OG < least_OG
        least_OG = torch.where(better_OG, error_OG, least_OG)
        zero_OG = None
        if steps.zero_OG is not None and best.zero_OG is not None:
            zero_OG = torch.where(better_OG, steps.zero_OG, best.zero_OG)
        best = Steps(scale_OG=torch.where(better_OG, steps.scale_OG, best.scale_OG), zero_OG=zero_OG)
    return best
