"""Rotary position embedding. Shapes: T tokens, H heads, K head dim, F frequencies (2F <= K)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from oarsmith.kernels.select import native_for


def rope(x_THK: Tensor, cos_TF: Tensor, sin_TF: Tensor, *, adjacent: bool = False) -> Tensor:
    """Rotate pairs of entries of each head by the tables' angles, in fp32 (Su et al. 2021).

    Pairs are (i, i + F), or (2i, 2i + 1) with ``adjacent``; entries from 2F on pass.
    """
    if native_for(x_THK) is not None:
        return _Rope.apply(x_THK, cos_TF, sin_TF, adjacent)
    return rope_reference(x_THK, cos_TF, sin_TF, adjacent=adjacent)


def rope_reference(x_THK: Tensor, cos_TF: Tensor, sin_TF: Tensor, *, adjacent: bool = False) -> Tensor:
    """The plain twin."""
    freqs = cos_TF.shape[-1]
    cos, sin = cos_TF[:, None], sin_TF[:, None]
    wide = x_THK[..., : 2 * freqs].float()
    a, b = (wide[..., 0::2], wide[..., 1::2]) if adjacent else (wide[..., :freqs], wide[..., freqs:])
    pair = a * cos - b * sin, b * cos + a * sin
    turned = (torch.stack(pair, -1).flatten(-2) if adjacent else torch.cat(pair, -1)).to(x_THK.dtype)
    return turned if 2 * freqs == x_THK.shape[-1] else torch.cat((turned, x_THK[..., 2 * freqs :]), -1)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_THK: Tensor, cos_TF: Tensor, sin_TF: Tensor, adjacent: bool) -> Tensor:
        ctx.save_for_backward(cos_TF, sin_TF)
        ctx.adjacent = adjacent
        return _rotate(x_THK, cos_TF, sin_TF, 1.0, adjacent)

    @staticmethod
    def backward(ctx: Any, dy_THK: Tensor) -> tuple[Tensor | None, ...]:
        cos_TF, sin_TF = ctx.saved_tensors
        return _rotate(dy_THK, cos_TF, sin_TF, -1.0, ctx.adjacent), None, None, None


def _rotate(x_THK: Tensor, cos_TF: Tensor, sin_TF: Tensor, sign: float, adjacent: bool) -> Tensor:
    if x_THK.stride(-1) != 1:
        x_THK = x_THK.contiguous()
    tokens, heads, dim = x_THK.shape
    assert cos_TF.shape == sin_TF.shape == (tokens, cos_TF.shape[-1]), (x_THK.shape, cos_TF.shape, sin_TF.shape)
    assert cos_TF.dtype == sin_TF.dtype == torch.float32 and 2 * cos_TF.shape[-1] <= dim, (cos_TF.dtype, cos_TF.shape)
    out_THK = torch.empty(x_THK.shape, dtype=x_THK.dtype)
    library = native_for(x_THK)
    assert library is not None
    stride_t, stride_h, _ = x_THK.stride()
    sizes = (tokens, heads, dim, cos_TF.shape[-1], stride_t, stride_h)
    library.call(
        "rope", x_THK.dtype, x_THK, out_THK, cos_TF.contiguous(), sin_TF.contiguous(), *sizes, sign, int(adjacent)
    )
    return out_THK
