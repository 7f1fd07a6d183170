"""HQQ: zeros fitted to the weights alone, by a norm that forgives outliers. No calibration.

Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models" (mobiusml.github.io/hqq_blog),
equations 1 to 6: min over z, e of ||e||_p^p + beta/2 ||W - s (n - z) - e||^2, with p = .7 below 1, in turns: e by the
generalized soft threshold, z as a mean, beta growing.

Zeros are no whole numbers then. Most formats (compressed-tensors, GPTQ, AWQ) only keep whole ones: `with_whole_zeros`.

Shapes: O out features, I in features, G groups of a row, K columns of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from oarsmith.errors import ConfigError
from oarsmith.quantize.checks import check_weight
from oarsmith.quantize.grid import Grid, Steps, grouped
from oarsmith.quantize.search import refit_scales, root_importance

_TINY = 1e-12
_CHUNK = 1 << 17


@dataclass(frozen=True, kw_only=True)
class HQQ:
    """The authors' numbers.

    Attributes:
        norm: p.
        beta: how closely e follows the error at first.
        kappa: by which beta grows each turn.
        turns: at most; a group keeps the zero of its least error.
    """

    norm: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    turns: int = 20


@torch.no_grad()
def hqq_steps(weight_OI: Tensor, grid: Grid, settings: HQQ | None = None) -> Steps:
    """Scales of the range, and zeros, not whole, of least error.

    Raises:
        ConfigError: for a grid without zeros.
        ModelError: for weights that are not finite.
    """
    settings = HQQ() if settings is None else settings
    check_weight(weight_OI)
    if grid.symmetric or grid.code != "int":
        raise ConfigError("HQQ fits zeros, which this grid has none of", where="hqq", fix="use an asymmetric grid")
    size = weight_OI.shape[1]
    ones_GK = functional.pad(torch.ones(size), (0, -size % grid.group_of(size))).unflatten(0, (-1, grid.group_of(size)))
    rows = max(1, _CHUNK // size)
    parts = [_fit(grouped(part.float(), grid), ones_GK, grid, settings) for part in weight_OI.split(rows)]
    return Steps(scale_OG=torch.cat([part[0] for part in parts]), zero_OG=torch.cat([part[1] for part in parts]))


def _fit(weight_OGK: Tensor, ones_GK: Tensor, grid: Grid, settings: HQQ) -> tuple[Tensor, Tensor]:
    low_OG1, high_OG1 = weight_OGK.amin(-1, keepdim=True), weight_OGK.amax(-1, keepdim=True)
    # One number all over: its own size is the step, so that it lies on the grid.
    flat_OG1 = (high_OG1 - low_OG1) < _TINY
    scale_OG1 = torch.where(flat_OG1, low_OG1.abs(), (high_OG1 - low_OG1) / grid.largest)
    scale_OG1 = torch.where(scale_OG1 < _TINY, 1.0, scale_OG1)
    units_OGK, zero_OG1 = weight_OGK / scale_OG1, -low_OG1 / scale_OG1
    zero_OG1 = torch.where(flat_OG1, torch.where(low_OG1 < 0, 1.0, 0.0), zero_OG1)
    best_OG1, least_OG1 = zero_OG1, torch.full_like(zero_OG1, torch.inf)
    beta, count_G1 = settings.beta, ones_GK.sum(-1, keepdim=True)
    for _ in range(settings.turns + 1):
        numbers_OGK = (units_OGK + zero_OG1).round_().clamp_(0, grid.largest)
        error_OGK = (weight_OGK - (numbers_OGK - zero_OG1) * scale_OG1) * ones_GK
        error_OG1 = error_OGK.abs().pow(settings.norm).sum(-1, keepdim=True)
        better_OG1 = error_OG1 < least_OG1
        best_OG1 = torch.where(better_OG1, zero_OG1, best_OG1)
        least_OG1 = torch.where(better_OG1, error_OG1, least_OG1)
        kept_OGK = shrink(error_OGK, beta, settings.norm)
        moved_OGK = (numbers_OGK - units_OGK + kept_OGK / scale_OG1) * ones_GK
        zero_OG1 = moved_OGK.sum(-1, keepdim=True) / count_G1
        beta *= settings.kappa
    return scale_OG1[..., 0], best_OG1[..., 0]


def shrink(x: Tensor, beta: float, norm: float) -> Tensor:
    """sign(x) relu(|x| - |x|^(norm - 1) / beta): what the norm makes of an error (equation 4)."""
    size = x.abs()
    return x.sign() * (size - size.clamp_min(_TINY).pow(norm - 1) / beta).clamp_min(0)


@torch.no_grad()
def with_whole_zeros(weight_OI: Tensor, steps: Steps, grid: Grid) -> Steps:
    """Zeros rounded onto the grid, and scales fitted anew to the numbers that weights then have (least squares)."""
    assert steps.zero_OG is not None, "steps without zeros"
    whole = Steps(scale_OG=steps.scale_OG, zero_OG=steps.zero_OG.round().clamp(0, grid.largest))
    return refit_scales(weight_OI.float(), whole, grid, root_importance(weight_OI, grid))
