"""Integers in words, and what weights of integers with scales and zeros have in common.

Shapes: O out features, I in features, G groups of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from oarsmith.checkpoint.quantized.base import Config, Packed
from oarsmith.checkpoint.tensors import TensorSource
from oarsmith.kernels.coded import INT4, INT8, UINT4, UINT8, CodedWeight, pack_pairs


def float_kind(config: Config, scale: str) -> str:
    """The dtype that a quantized weight stands for: that of its scales, or the config's where they are fp32."""
    if scale in ("F16", "BF16"):
        return scale
    named = config.get("torch_dtype", config.get("dtype"))
    return "F16" if named == "float16" else "BF16"


def stems(source: TensorSource, ending: str) -> list[str]:
    """What the names of tensors with this ending begin with."""
    return [name.removesuffix(ending) for name in source.shapes if name.endswith(ending)]


def group_size(in_features: int, groups: int, wanted: object) -> int | None:
    """Columns of a group: what the config says where it gives that many groups, else equal parts; None: neither."""
    if type(wanted) is int and wanted > 0 and -(-in_features // wanted) == groups:
        return wanted
    return in_features // groups if groups > 0 and in_features % groups == 0 else None


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """int32 [..., N] to the numbers of ``bits`` bits in them, lowest first: uint8 [..., 32 N / bits]."""
    if 32 % bits == 0:
        shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
        return (words[..., None] >> shifts & (1 << bits) - 1).to(torch.uint8).flatten(-2)
    # Numbers that go on in the next word: a stream of single bits.
    stream = (words[..., None] >> torch.arange(32, dtype=torch.int32) & 1).to(torch.uint8).flatten(-2)
    places = (1 << torch.arange(bits)).to(torch.uint8)
    return (stream.unflatten(-1, (-1, bits)) * places).sum(-1, dtype=torch.uint8)


def pack_words(numbers: Tensor, bits: int) -> Tensor:
    """The other way: numbers [..., N] to int32 [..., N bits / 32]."""
    stream = numbers.long()[..., None] >> torch.arange(bits) & 1
    words = stream.flatten(-2).unflatten(-1, (-1, 32)) << torch.arange(32)
    return words.sum(-1).to(torch.int32)


def numbers_on_grid(grid: Packed, weight_OI: Tensor, bits: int) -> Tensor:
    """Numbers without sign [O, I] of the steps nearest to another weight, in the order of its inputs."""
    coded, columns = grid.weight, grid.columns
    group_I = torch.arange(coded.in_features) // coded.group
    if columns is not None:
        group_I = group_I[columns]
    scale_OI = coded.scale_OG.float()[:, group_I]
    zero = 1 << bits - 1 if coded.zero_OG is None else coded.zero_OG.float()[:, group_I]
    steps = (weight_OI / scale_OI).nan_to_num(0.0).round() + zero
    return steps.clamp(0, (1 << bits) - 1).to(torch.uint8)


def integer_weight(
    numbers_OI: Tensor, scales_OG: Tensor, zeros_OG: Tensor | None, bits: int, group: int
) -> CodedWeight:
    """w = (number - zero) * scale of numbers without sign; no zeros: all are the middle of the range.

    Zeros that are all the middle of 4 or 8 bits are left out.
    """
    middle = 1 << bits - 1
    symmetric = zeros_OG is None or (bits in (4, 8) and bool((zeros_OG == middle).all()))
    narrow = bits < 8 and group % 2 == 0 and (bits == 4 or not symmetric)  # pairs of codes share a group
    if symmetric:
        code, codes = (INT4, numbers_OI) if narrow else (INT8, numbers_OI - middle)
    else:
        code, codes = (UINT4 if narrow else UINT8), numbers_OI
    return CodedWeight(
        code=code,
        group=group,
        in_features=numbers_OI.shape[1],
        codes_OB=(pack_pairs(codes) if narrow else codes).contiguous(),
        scale_OG=scales_OG.contiguous(),
        zero_OG=None if symmetric or zeros_OG is None else zeros_OG.to(torch.uint8).contiguous(),
    )
