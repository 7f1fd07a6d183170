"""What numbers a quantized weight may have, and a weight on such a grid.

Integers have no sign here: w = (number - zero) * scale, and a symmetric grid's zero is the middle of its range. Floats
are E4M3, w = number * scale. A quantized weight is a `CodedWeight`'s numbers before they are packed.

Shapes: O out features, I in features, G groups of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from oarsmith.kernels.coded import NF4

E4M3_MAX = 448.0
_TINY = 1e-12
_CHUNK = 1 << 17
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A weight's numbers.

    Attributes:
        code: whole numbers, E4M3, or QLoRA's 16 quantiles of a normal distribution (`kernels.coded.NF4`), whose numbers
            are places in that table.
        bits: 2, 3, 4 or 8; 8 for E4M3, 4 for NF4.
        group: columns that share a scale; None: the whole row.
        rows: rows that share it too (FP8 blocks); None: all of them.
        symmetric: no zeros. The extreme of a group lies on the lowest number, with a scale of its sign (AutoRound's
            rule), so the whole range is used; of 8 bits scales are positive and the lowest number is left out.
        scales: what scales are stored as. Steps have such scales from the start, so that numbers are chosen for them.
    """

    code: Literal["int", "e4m3", "nf4"] = "int"
    bits: int = 4
    group: int | None = 64
    rows: int | None = 1
    symmetric: bool = False
    scales: Literal["fp32", "bf16", "fp16"] = "fp32"

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

    def rows(self, rows: slice) -> Steps:
        """Those of some rows."""
        return Steps(scale_OG=self.scale_OG[rows], zero_OG=None if self.zero_OG is None else self.zero_OG[rows])

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
    """A weight on a grid: numbers [O, I], float8_e4m3fn of E4M3, uint8 of the others."""

    grid: Grid
    numbers_OI: Tensor
    steps: Steps

    def rows(self, rows: slice) -> Quantized:
        """Some rows of it."""
        return replace(self, numbers_OI=self.numbers_OI[rows], steps=self.steps.rows(rows))

    def dense(self) -> Tensor:
        """The weight in fp32."""
        out_OI = torch.empty(self.numbers_OI.shape)
        for rows in _row_chunks(self.numbers_OI):
            scale, zero = _of_groups(self.steps, rows, self.numbers_OI.shape[1], self.grid)
            numbers = _in_groups(self.numbers_OI[rows], self.grid)
            _in_groups(out_OI[rows], self.grid).copy_(decode(numbers, scale, zero, self.grid))
        return out_OI


def decode(numbers: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid) -> Tensor:
    """Numbers to what they stand for, in fp32; scales and zeros of a shape that fits theirs."""
    if grid.code == "nf4":
        return torch.tensor(NF4.values)[numbers.int()].mul_(scale)
    wide = numbers.float()
    if grid.code == "int":
        wide -= grid.middle if zero is None else zero
    return wide.mul_(scale)


def encode(weight: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid) -> Tensor:
    """The nearest numbers; what is not a number becomes the zero."""
    scaled = weight / torch.where(scale.abs() < _TINY, 1.0, scale)
    if grid.code == "nf4":
        values = torch.tensor(NF4.values)
        return torch.bucketize(scaled.nan_to_num_(0.0), (values[:-1] + values[1:]) / 2).to(torch.uint8)
    if grid.code == "e4m3":
        return scaled.nan_to_num_(0.0).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    scaled += grid.middle if zero is None else zero
    return scaled.nan_to_num_(float(grid.middle)).round_().clamp_(0, grid.largest).to(torch.uint8)


def quantize(weight_OI: Tensor, grid: Grid, steps: Steps | None = None) -> Quantized:
    """Round to nearest, on steps of the range of each group unless others are given."""
    steps = range_steps(weight_OI, grid) if steps is None else steps
    dtype = torch.float8_e4m3fn if grid.code == "e4m3" else torch.uint8
    numbers_OI = torch.empty(weight_OI.shape, dtype=dtype)
    for rows in _row_chunks(weight_OI):
        scale, zero = _of_groups(steps, rows, weight_OI.shape[1], grid)
        numbers = encode(_in_groups(weight_OI[rows].float(), grid), scale, zero, grid)
        _in_groups(numbers_OI[rows], grid).copy_(numbers)
    return Quantized(grid=grid, numbers_OI=numbers_OI, steps=steps)


def _row_chunks(x_OI: Tensor) -> Iterator[slice]:
    """Rows at a time of which a few copies stay in a core's cache."""
    size = max(1, _CHUNK // max(1, x_OI.shape[1]))
    for start in range(0, len(x_OI), size):
        yield slice(start, start + size)


def _in_groups(x_OI: Tensor, grid: Grid) -> Tensor:
    """[O, G, K] where groups divide the columns, else [O, I]: a view."""
    group = grid.group_of(x_OI.shape[1])
    return x_OI if x_OI.shape[1] % group else x_OI.unflatten(1, (-1, group))


def _of_groups(steps: Steps, rows: slice, width: int, grid: Grid) -> tuple[Tensor, Tensor | None]:
    """Scales and zeros of rows, of a shape that fits theirs in groups."""
    own, group = steps.rows(rows), grid.group_of(width)
    if width % group:
        return own.columns(0, width, group)
    return own.scale_OG[..., None], None if own.zero_OG is None else own.zero_OG[..., None]


def range_steps(weight_OI: Tensor, grid: Grid, shrink: float | Tensor = 1.0) -> Steps:
    """Steps that cover each group's range, times ``shrink`` (a number, or one for each group [O, G])."""
    groups_OGK = grouped(weight_OI.float(), grid)
    if grid.symmetric or grid.code != "int":
        low, high = groups_OGK.amin(-1), groups_OGK.amax(-1)
        extreme = torch.where(-low >= high, low, high) * shrink
        if grid.code == "e4m3":
            scale_OG = extreme.abs() / E4M3_MAX
        elif grid.code == "nf4":
            scale_OG = extreme.abs()
        else:
            scale_OG = extreme.abs() / (grid.middle - 1) if grid.bits == 8 else extreme / -grid.middle
        return stored(Steps(scale_OG=_shared(scale_OG, grid)), grid)
    low, high = groups_OGK.amin(-1).clamp_max(0) * shrink, groups_OGK.amax(-1).clamp_min(0) * shrink
    scale = as_stored((high - low) / grid.largest, grid)
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


def as_stored(scale: Tensor, grid: Grid) -> Tensor:
    """Scales as the grid's files hold them, in fp32."""
    return scale.to(_DTYPES[grid.scales]).float()


def stored(steps: Steps, grid: Grid) -> Steps:
    """Steps with such scales."""
    return replace(steps, scale_OG=as_stored(steps.scale_OG, grid))
