"""Rotary position embedding. Shapes: T tokens, H heads, K head dim, F frequencies (2F <= K)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from oarsmith.kernels.select import native_for


def rope(x_THK: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    """Rotate pairs (i, i + F) of each head by the tables' angles, in fp32; entries from 2F on pass (Su et al. 2021)."""
    if native_for(x_THK) is not None:
        return _Rope.apply(x_THK, cos_TF, sin_TF)
    return rope_reference(x_THK, cos_TF, sin_TF)


def rope_reference(x_THK: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    """The plain twin."""
    freqs = cos_TF.shape[-1]
    cos, sin = cos_TF[:, None], sin_TF[:, None]
    a, b = x_THK[..., :freqs].float(), x_THK[..., freqs : 2 * freqs].float()
    turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x_THK.dtype)
    return turned if 2 * freqs == x_THK.shape[-1] else torch.cat((turned, x_THK[..., 2 * freqs :]), -1)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_THK: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TF, sin_TF)
        return _rotate(x_THK, cos_TF, sin_TF, 1.0)

    @staticmethod
    def backward(ctx: Any, dy_THK: Tensor) -> tuple[Tensor | None, ...]:
        cos_TF, sin_TF = ctx.saved_tensors
        return _rotate(dy_THK, cos_TF, sin_TF, -1.0), None, None


def _rotate(x_THK: Tensor, cos_TF: Tensor, sin_TF: Tensor, sign: float) -> Tensor:
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
    library.call("rope", x_THK.dtype, x_THK, out_THK, cos_TF.contiguous(), sin_TF.contiguous(), *sizes, sign)
    return out_THK
