"""Frozen linear maps whose weights are codes of 4 or 8 bits: w = (value of the code - zero) * scale.

A run of ``group`` columns of a row shares a scale, and a zero where the code has one. A product decodes a part of the
weight at a time into x's dtype: the whole of it never exists in floats, and nothing is computed for its gradient.

Shapes: T tokens, I in features, O out features, G groups of a row, B bytes of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from oarsmith.kernels.select import library

# Elements decoded at a time: 2 MB of bf16 stay in a core's cache, and products of this size run at full speed.
TILE = 1 << 20
_COLUMNS = 64  # columns are cut at multiples of this: codes in pairs stay together
_NATIVE = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Code:
    """What the codes of a weight stand for. Two codes of 4 bits lie in a byte, the first in the upper half."""

    name: str
    bits: Literal[4, 8]
    values: tuple[float, ...] = field(repr=False)


# The quantiles of a normal distribution that QLoRA rounds to (Dettmers et al. 2023, appendix E).
NF4 = Code(
    "nf4",
    4,
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
)
# A sign, two bits of exponent, one of fraction, as bitsandbytes encodes them.
_FP4 = tuple(value / 12 for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))
FP4 = Code("fp4", 4, (*_FP4, *(-value for value in _FP4)))
UINT4 = Code("uint4", 4, tuple(float(code) for code in range(16)))
INT4 = Code("int4", 4, tuple(code - 8.0 for code in range(16)))  # 0 stands for -8
UINT8 = Code("uint8", 8, tuple(float(code) for code in range(256)))
INT8 = Code("int8", 8, tuple(float(code - 256 * (code > 127)) for code in range(256)))  # two's complement
E4M3 = Code("e4m3", 8, tuple(torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().tolist()))


@dataclass(frozen=True, kw_only=True)
class CodedWeight:
    """A weight [O, I]: ``codes_OB`` uint8, ``scale_OG`` of any float dtype, ``zero_OG`` uint8 where there are zeros."""

    code: Code
    group: int
    in_features: int
    codes_OB: Tensor
    scale_OG: Tensor
    zero_OG: Tensor | None = None

    @property
    def out_features(self) -> int:
        return len(self.codes_OB)

    def rows(self, start: int, stop: int) -> CodedWeight:
        """Some rows of it."""
        zero = None if self.zero_OG is None else self.zero_OG[start:stop]
        return CodedWeight(
            code=self.code,
            group=self.group,
            in_features=self.in_features,
            codes_OB=self.codes_OB[start:stop],
            scale_OG=self.scale_OG[start:stop],
            zero_OG=zero,
        )


def coded_forward(x_TI: Tensor, weight: CodedWeight, bias_O: Tensor | None = None) -> Tensor:
    """x W^T + b."""
    out_TO = x_TI.new_empty(len(x_TI), weight.out_features)
    for start, stop in _tiles(weight.out_features, weight.in_features, step=1):
        tile = decode(weight.rows(start, stop), x_TI.dtype)
        out = out_TO[:, start:stop]
        if bias_O is None:
            torch.mm(x_TI, tile.t(), out=out)
        else:
            torch.addmm(bias_O[start:stop].to(x_TI.dtype), x_TI, tile.t(), out=out)
    return out_TO


def coded_backward(dy_TO: Tensor, weight: CodedWeight) -> Tensor:
    """dy W. Columns of W at a time: no sum over tiles is rounded in between."""
    out_TI = dy_TO.new_empty(len(dy_TO), weight.in_features)
    for start, stop in _tiles(weight.in_features, weight.out_features, step=_COLUMNS):
        torch.mm(dy_TO, decode(weight, dy_TO.dtype, start, stop), out=out_TI[:, start:stop])
    return out_TI


def _tiles(size: int, other: int, step: int) -> Iterator[tuple[int, int]]:
    """Ranges of about equal length, multiples of ``step``, that make up ``size``."""
    steps = -(-size // step)
    count = min(steps, -(-size * other // TILE))
    if count == 0:
        return
    length = -(-steps // count) * step
    for start in range(0, size, length):
        yield start, min(start + length, size)


def decode(weight: CodedWeight, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
    """Columns [start, stop) of the weight; where codes lie in pairs, ``start`` and the group are even."""
    stop = weight.in_features if stop is None else stop
    assert weight.code.bits == 8 or (start % 2 == 0 and weight.group % 2 == 0), (start, weight.group)
    kernels = library() if weight.codes_OB.device.type == "cpu" and dtype in _NATIVE else None
    if kernels is None or torch.compiler.is_compiling():
        return decode_reference(weight, dtype, start, stop)
    out = torch.empty(weight.out_features, stop - start, dtype=dtype)
    zero = None if weight.zero_OG is None else weight.zero_OG.contiguous()
    codes, scale = weight.codes_OB.contiguous(), weight.scale_OG.float().contiguous()
    sizes = (weight.out_features, codes.shape[1], scale.shape[1], weight.group, start, stop)
    kernels.call(f"decode{weight.code.bits}", dtype, codes, _values(weight.code), scale, zero, out, *sizes)
    return out


def decode_reference(weight: CodedWeight, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
    """The plain twin."""
    stop = weight.in_features if stop is None else stop
    codes = (
        weight.codes_OB[:, start // 2 : (stop + 1) // 2] if weight.code.bits == 4 else weight.codes_OB[:, start:stop]
    )
    if weight.code.bits == 4:
        codes = unpack_pairs(codes)[:, : stop - start]
    group_of = torch.arange(start, stop, device=codes.device) // weight.group

    def columns(numbers_OG: Tensor) -> Tensor:
        return numbers_OG.float()[:, group_of]

    wide = _values(weight.code).to(codes.device)[codes.int()]
    if weight.zero_OG is not None:
        wide = wide - columns(weight.zero_OG)
    return (wide * columns(weight.scale_OG)).to(dtype)


@cache
def _values(code: Code) -> Tensor:
    return torch.tensor(code.values)


def pack_pairs(codes: Tensor) -> Tensor:
    """4-bit codes [..., K] two a byte [..., ceil(K / 2)]."""
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[..., 0::2] << 4 | codes[..., 1::2]


def unpack_pairs(pairs: Tensor) -> Tensor:
    """The 4-bit codes of bytes."""
    return torch.stack((pairs >> 4, pairs & 15), -1).flatten(-2)
