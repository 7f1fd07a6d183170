"""A frozen linear map in 8 bits, forward and backward.

A row of x and a row of W each get one scale: their largest entry becomes 127. Before that both are rotated by the same
orthogonal matrix, which leaves x W^T as it is and spreads the few large activations that would spoil a scale (QuaRot,
Ashkboos et al. 2024). The matrix is a Hadamard transform H of entries that lie far apart, cheap enough for every call.

Shapes: T tokens, I in features, O out features.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from oarsmith.kernels.select import native_for

_MAX_ROTATION = 32
# Rows at a time: their 32-bit sums stay in the cache until they are scaled.
_ROWS = 512
# Without AVX512_VNNI PyTorch's 8-bit product is a plain loop, 25 times slower than fp32. With it, but oneDNN forbidden
# to use it, pairs are summed in 16 bits, which overflow.
_FAST_PRODUCTS = torch.cpu._is_vnni_supported() and not {"ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"} & os.environ.keys()


class Int8Weight(NamedTuple):
    """W H ~ values * scale: ``values_OI`` int8, ``scale_O`` fp32."""

    values_OI: Tensor
    scale_O: Tensor


def rotation_size(dim: int) -> int:
    """How many entries are mixed: the largest power of two, up to 32, that divides ``dim``."""
    return min(dim & -dim, _MAX_ROTATION)


def quantize_weight(weight_OI: Tensor) -> Int8Weight:
    """A weight in 8 bits."""
    return Int8Weight(*quantize_rows(weight_OI.contiguous(), rotation=rotation_size(weight_OI.shape[1])))


def int8_linear(x_TI: Tensor, weight: Int8Weight, bias_O: Tensor | None = None) -> Tensor:
    """x W^T + b, differentiable in x; products of 8-bit numbers with 32-bit sums."""
    return _Int8Linear.apply(x_TI, weight, bias_O)


def int8_forward(x_TI: Tensor, weight: Int8Weight, bias_O: Tensor | None = None) -> Tensor:
    """x W^T + b of contiguous x."""
    out_TO = x_TI.new_empty(len(x_TI), len(weight.scale_O))
    bias_O = None if bias_O is None else bias_O.float()
    rotation = rotation_size(x_TI.shape[1])
    for x, out in zip(x_TI.split(_ROWS), out_TO.split(_ROWS), strict=True):
        values, scale = quantize_rows(x, rotation=rotation)
        dequantize_rows(_product(values, weight.values_OI.t()), scale, out, columns=weight.scale_O, bias=bias_O)
    return out_TO


def int8_backward(dy_TO: Tensor, weight: Int8Weight) -> Tensor:
    """dy W of contiguous dy, with the same 8-bit W: its scales go to the columns of dy."""
    out_TI = dy_TO.new_empty(len(dy_TO), weight.values_OI.shape[1])
    rotation = rotation_size(out_TI.shape[1])
    for dy, out in zip(dy_TO.split(_ROWS), out_TI.split(_ROWS), strict=True):
        values, scale = quantize_rows(dy, columns=weight.scale_O)
        dequantize_rows(_product(values, weight.values_OI), scale, out, rotation=rotation)
    return out_TI


class _Int8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Int8Weight, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        return int8_forward(flat, weight, bias).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        flat = dy.reshape(-1, dy.shape[-1]).contiguous()
        return int8_backward(flat, ctx.weight).unflatten(0, dy.shape[:-1]), None, None


def _product(a: Tensor, b: Tensor) -> Tensor:
    """int8 matrices to int32."""
    if a.device.type == "cpu" and _FAST_PRODUCTS:
        return torch._int_mm(a, b)
    # Products and sums up to 2^24 are exact in fp32 (also where products are taken in TF32), larger sums to 24 bits.
    return (a.float() @ b.float()).to(torch.int32)


def quantize_rows(x_RK: Tensor, *, columns: Tensor | None = None, rotation: int = 1) -> tuple[Tensor, Tensor]:
    """int8 values and fp32 scales of the rows of x (contiguous), times ``columns`` (fp32), rotated."""
    library = native_for(x_RK)
    if library is None:
        return quantize_rows_reference(x_RK, columns=columns, rotation=rotation)
    values, scale = torch.empty(x_RK.shape, dtype=torch.int8), torch.empty(len(x_RK))
    assert x_RK.is_contiguous(), x_RK.stride()
    library.call("quantize_rows", x_RK.dtype, x_RK, columns, values, scale, *x_RK.shape, rotation)
    return values, scale


def quantize_rows_reference(x_RK: Tensor, *, columns: Tensor | None = None, rotation: int = 1) -> tuple[Tensor, Tensor]:
    """The plain twin."""
    wide = x_RK.float() if columns is None else x_RK.float() * columns
    wide = rotate(wide, rotation)
    scale = wide.abs().amax(-1) / 127
    values = wide / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    return values.nan_to_num(0, 0, 0).round().clamp(-127, 127).to(torch.int8), scale + (wide - wide).sum(-1)


def dequantize_rows(
    sums_RK: Tensor,
    scale_R: Tensor,
    out_RK: Tensor,
    *,
    columns: Tensor | None = None,
    bias: Tensor | None = None,
    rotation: int = 1,
) -> None:
    """Writes sums * scale * columns + bias, or rotate(sums * scale); fp32 numbers, ``sums`` int32."""
    assert rotation == 1 or (columns is None and bias is None), "either columns and bias, or a rotation"
    library = native_for(out_RK)
    if library is None:
        out_RK.copy_(dequantize_rows_reference(sums_RK, scale_R, columns=columns, bias=bias, rotation=rotation))
        return
    tensors = (sums_RK, scale_R, columns, bias, out_RK)
    library.call("dequantize_rows", out_RK.dtype, *tensors, *sums_RK.shape, rotation)


def dequantize_rows_reference(
    sums_RK: Tensor,
    scale_R: Tensor,
    *,
    columns: Tensor | None = None,
    bias: Tensor | None = None,
    rotation: int = 1,
) -> Tensor:
    """The plain twin, in fp32."""
    wide = sums_RK.float() * scale_R[:, None]
    wide = wide if columns is None else wide * columns
    return rotate(wide if bias is None else wide + bias, rotation)


def rotate(x_RK: Tensor, size: int) -> Tensor:
    """x H: a normalised Hadamard transform of ``size`` entries that lie K / size apart. It is its own inverse."""
    x = x_RK.unflatten(-1, (size, -1))
    span = size // 2
    while span >= 1:
        a, b = x.unflatten(-2, (-1, 2, span)).unbind(-3)
        x = torch.stack((a + b, a - b), -3).flatten(-4, -2)
        span //= 2
    return x.flatten(-2) * size**-0.5
