"""RMS normalisation. Shapes: the last axis (D) is normalised; everything before it is rows (R)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from oarsmith.kernels.remake import leave_recipe
from oarsmith.kernels.select import native_for


def rms_norm(x: Tensor, weight: Tensor, eps: float, unit_offset: bool = False) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * w, statistics in fp32 (Zhang and Sennrich 2019); unit_offset: * (1 + w) in fp32."""
    if native_for(x, weight) is not None:
        y = _RMSNorm.apply(x, weight, eps, unit_offset)
        return leave_recipe(y, partial(_normed, eps=eps, unit_offset=unit_offset), x, weight)
    return rms_norm_reference(x, weight, eps, unit_offset)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, unit_offset: bool = False) -> Tensor:
    """The plain twin."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if unit_offset:
        return (wide * (1.0 + weight.float())).to(x.dtype)
    return wide.to(x.dtype) * weight


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """``x`` with evenly strided rows, and that stride: slices of a fused projection are read where they lie."""
    flat = x if x.stride(-1) == 1 else x.contiguous()
    if flat.dim() == 2:
        return flat, flat.stride(0)
    flat = flat.contiguous()
    return flat, flat.shape[-1]


def _normed(x: Tensor, weight: Tensor, *, eps: float, unit_offset: bool) -> Tensor:
    return _forward(x, weight, eps, unit_offset)[0]


def _forward(x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> tuple[Tensor, Tensor, Tensor, int]:
    """The normed rows, 1 / rms of each, and what :func:`_rows` gives."""
    library = native_for(x, weight)
    assert library is not None
    flat, stride = _rows(x)
    dim = x.shape[-1]
    rows = x.numel() // dim
    y, rstd = torch.empty(x.shape, dtype=x.dtype), torch.empty(rows)
    library.call("rms_forward", x.dtype, flat, weight.contiguous(), y, rstd, rows, dim, stride, eps, int(unit_offset))
    return y, rstd, flat, stride


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> Tensor:
        y, rstd, flat, stride = _forward(x, weight, eps, unit_offset)
        ctx.save_for_backward(flat, weight.contiguous(), rstd)
        ctx.stride, ctx.unit_offset = stride, unit_offset
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        dy = dy.contiguous()
        dim = x.shape[-1]
        rows, threads = x.numel() // dim, torch.get_num_threads()
        dx = torch.empty(x.shape, dtype=x.dtype)
        partial = torch.zeros(threads, dim) if ctx.needs_input_grad[1] else None
        library = native_for(dy, weight)
        assert library is not None
        library.call(
            "rms_backward",
            x.dtype,
            dy,
            x,
            weight,
            rstd,
            dx,
            partial,
            rows,
            dim,
            ctx.stride,
            int(ctx.unit_offset),
            threads,
        )
        return dx, None if partial is None else partial.sum(0).to(weight.dtype), None, None
