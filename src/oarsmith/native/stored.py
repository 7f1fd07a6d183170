"""Weights of quantized checkpoints in the formats of the step, number by number. Only scales are rounded, to fp16.

Shapes: O out features, I in features, G groups of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from oarsmith.kernels.coded import E4M3, INT4, INT8, UINT4, UINT8, CodedWeight, unpack_pairs

GROUP = 32
E4M3_SCALES = 256.0
"""What cpp/matrix.h multiplies the scales of E4M3 with."""

Parts = Sequence[tuple[int, CodedWeight]]
"""A weight's parts with their first rows, in the order of these."""

# A scale that fp16 does not hold so far is not rounded to it: numbers with many digits, bf16 would keep more of them.
_SCALE_ERROR = 2.0**-10
_ZEROS = {INT4: 8, INT8: 128}
_INTEGERS = (UINT4, INT4, UINT8, INT8)


class WeightFiles(Protocol):
    """A checkpoint whose weights are read when they are asked for (checkpoint/deferred.py)."""

    def codes(self, parameter: nn.Parameter) -> Sequence[Parts] | None:
        """The codes of a weight, or of each of stacked ones; None: there are none that lie row by row."""

    def floats(self, parameter: nn.Parameter) -> Tensor:
        """The weight in floats."""


@dataclass(frozen=True)
class Coded:
    """A weight [O, I] as ``native_pack_codes`` takes it: bytes, fp32 scales, and lows of int4."""

    format: str
    codes_OI: Tensor
    scale_OG: Tensor
    low_OG: Tensor | None
    group: int


@dataclass(frozen=True)
class _Integers:
    """w = (number - zero) * scale; numbers without sign [O, I], zeros [O, G]."""

    numbers_OI: Tensor
    zero_OG: Tensor
    scale_OG: Tensor
    group: int


def coded(parts: Parts) -> Coded | str:
    """A weight in the format that holds its numbers, or what keeps it from all of them."""
    weights = [weight for _, weight in sorted(parts, key=lambda part: part[0])]
    columns = weights[0].in_features
    for weight in weights:
        if weight.code not in (*_INTEGERS, E4M3):
            return f"numbers of {weight.code.name}"
        if weight.group % GROUP and weight.group < columns:
            return f"groups of {weight.group} columns"
    if all(weight.code is E4M3 for weight in weights):
        group = _common(weights)
        scale = torch.cat([_regrouped(w.scale_OG.float(), w, group) for w in weights])
        if not _fits(scale * E4M3_SCALES):
            return "scales beyond fp16"
        return Coded("e4m3", _rows([w.codes_OB for w in weights]), scale.contiguous(), None, group)
    if any(weight.code is E4M3 for weight in weights):
        return "parts of integers and of floats"
    return _integers(weights)


def _integers(weights: Sequence[CodedWeight]) -> Coded | str:
    group = _common(weights)
    found = [_as_integers(weight, group) for weight in weights]
    scale = torch.cat([one.scale_OG for one in found]).contiguous()
    if not _fits(scale):
        return "scales beyond fp16"
    if all(int(one.numbers_OI.max()) < 16 for one in found):
        # The zero is one of the numbers as exactly as fp16 has the low.
        low = -torch.cat([one.zero_OG for one in found]) * scale.half().float()
        if not bool(torch.isfinite(low.half()).all()):
            return "scales beyond fp16"
        return Coded("int4", _rows([one.numbers_OI for one in found]), scale, low.contiguous(), group)
    signed = [_around_zero(one) for one in found]
    if any(one is None for one in signed):
        return "8 bits with zeros"
    return Coded("int8", _rows([one for one in signed if one is not None]), scale, None, group)


def _as_integers(weight: CodedWeight, group: int) -> _Integers:
    numbers = weight.codes_OB
    if weight.code.bits == 4:
        numbers = unpack_pairs(numbers)[:, : weight.in_features]
    elif weight.code is INT8:
        numbers = numbers ^ 128
    scale = weight.scale_OG.float()
    zero = torch.full_like(scale, _ZEROS[weight.code]) if weight.zero_OG is None else weight.zero_OG.float()
    if weight.code.bits == 8:
        # Numbers of fewer bits may lie in bytes.
        low, high = (int(value) for value in numbers.aminmax())
        if high - low < 16:
            numbers, zero = numbers - low, zero - low
    return _Integers(numbers, _regrouped(zero, weight, group), _regrouped(scale, weight, group), group)


def _around_zero(one: _Integers) -> Tensor | None:
    """number - zero + 128 in a byte; None: it does not fit."""
    if bool((one.zero_OG == 128).all()):
        return one.numbers_OI
    columns = one.numbers_OI.shape[1]
    zero_OI = one.zero_OG.to(torch.int16).repeat_interleave(one.group, 1)[:, :columns]
    shifted_OI = one.numbers_OI.to(torch.int16) - zero_OI + 128
    low, high = (int(value) for value in shifted_OI.aminmax())
    return shifted_OI.to(torch.uint8) if low >= 0 and high <= 255 else None


def _common(weights: Sequence[CodedWeight]) -> int:
    """Columns that share a scale in all of them: a whole row is as many as its padding."""
    whole = -(-weights[0].in_features // GROUP) * GROUP
    groups = {min(weight.group, whole) if weight.group < weight.in_features else whole for weight in weights}
    return groups.pop() if len(groups) == 1 else GROUP


def _regrouped(values_OG: Tensor, weight: CodedWeight, group: int) -> Tensor:
    """One for each group of this size."""
    count = -(-weight.in_features // group)
    if values_OG.shape[1] == count:
        return values_OG
    return values_OG.repeat_interleave(-(-weight.group // group), 1)[:, :count]


def _fits(scale: Tensor) -> bool:
    return bool(((scale.half().float() - scale).abs() <= scale.abs() * _SCALE_ERROR).all())


def _rows(parts: Sequence[Tensor]) -> Tensor:
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(list(parts))
