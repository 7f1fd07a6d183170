"""Weights in floats to codes of 4 and 8 bits with scales (see ``coded.py``), a few rows at a time.

Shapes: O out features, I in features, G groups of a row, K columns of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from oarsmith.kernels.coded import UINT4, Code, pack_pairs
from oarsmith.kernels.select import native_for

_CHUNK = 1 << 18  # numbers at a time: each of the copies of them takes a megabyte
_TINY = 1e-38  # bitsandbytes divides by no less


def encode_blocks(weight_OI: Tensor, code: Code, block: int) -> tuple[Tensor, Tensor]:
    """Pairs of codes [O, ceil(I / 2)] and fp32 absmax [O, G]: in each block the largest magnitude becomes 1.

    Numbers are rounded to the nearest value, one half way to that with the lower place in ascending order. bitsandbytes
    lays blocks along the flat weight; where the block divides I, as it does in released models, both are the same.
    """
    library = native_for(weight_OI)
    if library is None or block % 2:
        return encode_blocks_reference(weight_OI, code, block)
    (rows, width), (borders, order) = weight_OI.shape, _places(code)
    codes = torch.empty(rows, -(-width // 2), dtype=torch.uint8)
    absmax = torch.empty(rows, -(-width // block))
    sizes = (rows, width, block)
    library.call("encode4", weight_OI.dtype, weight_OI.contiguous(), borders, order.byte(), codes, absmax, *sizes)
    return codes, absmax


@cache
def _places(code: Code) -> tuple[Tensor, Tensor]:
    """Borders half way between the values in ascending order, and the code of each."""
    values = torch.tensor(code.values)
    order = values.argsort(stable=True)
    ascending = values[order]
    return (ascending[:-1] + ascending[1:]) / 2, order


def encode_blocks_reference(weight_OI: Tensor, code: Code, block: int) -> tuple[Tensor, Tensor]:
    """The plain twin."""
    borders, order = (table.to(weight_OI.device) for table in _places(code))

    def encode(groups_OGK: Tensor) -> tuple[Tensor, Tensor]:
        absmax_OG = groups_OGK.abs().amax(-1)
        scaled = (groups_OGK * (1 / absmax_OG.clamp_min(_TINY))[..., None]).clamp(-1, 1)
        return order[torch.bucketize(scaled, borders)].to(torch.uint8), absmax_OG

    codes, absmax = _by_rows(weight_OI, block, encode)
    return codes, absmax


def encode_groups(weight_OI: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of codes [O, ceil(I / 2)], scales [O, G] bf16 and zeros [O, G] uint8: 16 steps from the least number of a
    group, or 0, to the largest, or 0."""
    steps = len(UINT4.values) - 1

    def encode(groups_OGK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        low, high = groups_OGK.amin(-1).clamp_max(0), groups_OGK.amax(-1).clamp_min(0)
        scale = ((high - low) / steps).bfloat16()
        # A group of zeros has no step. What is not a number must stay so.
        step = scale.float()[..., None].nan_to_num(1.0).clamp_min(_TINY)
        zero = (-low[..., None] / step).nan_to_num(0.0).round().clamp(0, steps)
        codes = ((groups_OGK / step).nan_to_num(0.0).round() + zero).clamp(0, steps)
        return codes.to(torch.uint8), scale, zero[..., 0].to(torch.uint8)

    codes, scale, zero = _by_rows(weight_OI, group, encode)
    return codes, scale, zero


def encode_rows(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [O, I] and fp32 scales [O]: the largest magnitude of a row becomes 127."""
    values, scales = [], []
    for rows in _chunks(weight_OI):
        scale = rows.abs().amax(-1) / 127
        scaled = (rows / scale.clamp_min(_TINY)[:, None]).nan_to_num(0.0).round().clamp(-127, 127)
        values.append(scaled.to(torch.int8))
        scales.append(scale)
    return torch.cat(values), torch.cat(scales)


def _by_rows(weight_OI: Tensor, group: int, encode: Callable[[Tensor], tuple[Tensor, ...]]) -> list[Tensor]:
    """Codes in pairs, and what else ``encode`` makes of groups [O, G, K]. The last group of a row may be short."""
    in_features = weight_OI.shape[1]
    made = []
    for rows in _chunks(weight_OI):
        padded = functional.pad(rows, (0, -in_features % group)).unflatten(1, (-1, group))
        codes, *rest = encode(padded)
        made.append((pack_pairs(codes.flatten(1)[:, :in_features]), *rest))
    return [torch.cat(parts) for parts in zip(*made, strict=True)]


def _chunks(weight_OI: Tensor) -> Iterator[Tensor]:
    """Rows in fp32, so many that copies of them stay small beside a weight."""
    for rows in weight_OI.split(max(1, _CHUNK // max(1, weight_OI.shape[1]))):
        yield rows.float()
