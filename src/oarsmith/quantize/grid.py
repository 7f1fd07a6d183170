"""What numbers a quantized weight may have, and a weight on such a grid.

Integers have no sign here: w = (number - zero) * scale, and a symmetric grid's zero is the middle of its range. Floats
are E4M3, w = number * scale. A quantized weight is a `CodedWeight`'s numbers before they are packed.

Shapes: O out features, I in features, G groups of a row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

E4M3_MAX = 448.0
_TINY = 1e-12


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A weight's numbers.

    Attributes:
        bits: 2, 3, 4 or 8; 8 for E4M3.
        group: columns that share a scale; None: the whole row.
        rows: rows that share it too (FP8 blocks); None: all of them.
        symmetric: no zeros. The extreme of a group lies on the lowest number, with a scale of its sign (AutoRound's
            rule), so the whole range is used; of 8 bits scales are positive and the lowest number is left out.
    """

    code: Literal["int", "e4m3"] = "int"
    bits: int = 4
    group: int | None = 64
    rows: int | None = 1
    symmetric: bool = False

    @property
    def largest(self) -> int:
        """The largest number of an integer grid."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The zero of a symmetric integer grid."""
        return 1 << self.bits - 1

    def group_of(self, in_features: int) -> int:
        """Columns that share a scale."""
        return in_features if self.group is None else self.group

    def num_groups(self, in_features: int) -> int:
        """Groups of a row; the last one may be short."""
        return -(-in_features // self.group_of(in_features))


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Where a grid's numbers lie: fp32 scales [O, G], and zeros [O, G] as floats (whole numbers, but HQQ's need not be)
    where the grid is asymmetric."""

    scale_OG: Tensor
    zero_OG: Tensor | None = None

    def columns(self, start: int, stop: int, group: int) -> tuple[Tensor, Tensor | None]:
        """Scales and zeros [O, K] of single columns."""
        first, last = start // group, -(-stop // group)

        def spread(each_OG: Tensor) -> Tensor:
            # Ten times as fast as an index.
            wide_OK = each_OG[:, first:last, None].expand(-1, -1, group).flatten(1)
            return wide_OK[:, start - first * group : stop - first * group]

        return spread(self.scale_OG), None if self.zero_OG is None else spread(self.zero_OG)


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """A weight on a grid: numbers [O, I], uint8 of integers, float8_e4m3fn of floats."""

    grid: Grid
    numbers_OI: Tensor
    steps: Steps

    def dense(self) -> Tensor:
        """The weight in fp32."""
        scale, zero = self.steps.columns(0, self.numbers_OI.shape[1], self.grid.group_of(self.numbers_OI.shape[1]))
        return decode(self.numbers_OI, scale, zero, self.grid)


def decode(numbers_OK: Tensor, scale_OK: Tensor, zero_OK: Tensor | None, grid: Grid) -> Tensor:
    """Numbers to what they stand for, in fp32."""
    if grid.code == "e4m3":
        return numbers_OK.float() * scale_OK
    return (numbers_OK.float() - (grid.middle if zero_OK is None else zero_OK)) * scale_OK


def encode(weight_OK: Tensor, scale_OK: Tensor, zero_OK: Tensor | None, grid: Grid) -> Tensor:
    """The nearest numbers; what is not a number becomes the zero."""
    scaled = weight_OK / torch.where(scale_OK.abs() < _TINY, 1.0, scale_OK)
    if grid.code == "e4m3":
        return scaled.nan_to_num(0.0).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    steps = (scaled + (grid.middle if zero_OK is None else zero_OK)).nan_to_num(float(grid.middle)).round()
    return steps.clamp(0, grid.largest).to(torch.uint8)


def quantize(weight_OI: Tensor, grid: Grid, steps: Steps | None = None) -> Quantized:
    """Round to nearest, on steps of the range of each group unless others are given."""
    steps = range_steps(weight_OI, grid) if steps is None else steps
    scale, zero = steps.columns(0, weight_OI.shape[1], grid.group_of(weight_OI.shape[1]))
    return Quantized(grid=grid, numbers_OI=encode(weight_OI.float(), scale, zero, grid), steps=steps)


def range_steps(weight_OI: Tensor, grid: Grid, shrink: float | Tensor = 1.0) -> Steps:
    """Steps that cover each group's range, times ``shrink`` (a number, or one for each group [O, G])."""
    groups_OGK = grouped(weight_OI.float(), grid)
    if grid.symmetric or grid.code == "e4m3":
        low, high = groups_OGK.amin(-1), groups_OGK.amax(-1)
        extreme = torch.where(-low >= high, low, high) * shrink
        if grid.code == "e4m3":
            return Steps(scale_OG=_shared(extreme.abs() / E4M3_MAX, grid))
        if grid.bits == 8:
            return Steps(scale_OG=_shared(extreme.abs() / (grid.middle - 1), grid))
        return Steps(scale_OG=_shared(extreme / -grid.middle, grid))
    low, high = groups_OGK.amin(-1).clamp_max(0) * shrink, groups_OGK.amax(-1).clamp_min(0) * shrink
    scale = (high - low) / grid.largest
    zero = (-low / torch.where(scale < _TINY, 1.0, scale)).round().clamp(0, grid.largest)
    return Steps(scale_OG=scale, zero_OG=zero)


def grouped(weight_OI: Tensor, grid: Grid) -> Tensor:
    """Groups [O, G, K]; a short last group is filled with its first number, which changes no range."""
    group, width = grid.group_of(weight_OI.shape[1]), weight_OI.shape[1]
    missing = -width % group
    if missing:
        first = weight_OI[:, width - width % group, None]
        weight_OI = torch.cat([weight_OI, first.expand(-1, missing)], 1)
    return weight_OI.unflatten(1, (-1, group))


def _shared(scale_OG: Tensor, grid: Grid) -> Tensor:
    """The largest scale of the rows that share one, beside each of them."""
    if grid.rows == 1:
        return scale_OG
    rows = len(scale_OG) if grid.rows is None else grid.rows
    padded = functional.pad(scale_OG.abs(), (0, 0, 0, -len(scale_OG) % rows))
    return padded.unflatten(0, (-1, rows)).amax(1).repeat_interleave(rows, 0)[: len(scale_OG)]


def with_scales(quantized: Quantized, dtype: torch.dtype) -> Quantized:
    """The scales as a file of this dtype has them."""
    steps = replace(quantized.steps, scale_OG=quantized.steps.scale_OG.to(dtype).float())
    return replace(quantized, steps=steps)
