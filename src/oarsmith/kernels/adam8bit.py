"""One AdamW step on one tensor whose moments are kept in 8 bits (Dettmers et al. 2022, "8-bit Optimizers via Block-wise
Quantization").

A block of 256 numbers has a scale, its largest magnitude, and each number is the index of the nearest of 256 values
(section 2.2, "dynamic tree quantization"; the values are those of the authors' library, bitsandbytes). The map of
second moments has no negative half and one more bit of fraction.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from oarsmith.kernels.adamw import AdamWRule, adamw_reference
from oarsmith.kernels.select import library

BLOCK = 256
_ZERO = 127  # index of 0 in the signed map
# As in adam8bit.cpp: a key is the leading bits of a magnitude from 2^-23 to 1, with 7 bits of fraction.
_LOWEST, _HIGHEST, _KEY_SHIFT = 104 << 23, 127 << 23, 16


class Moments8bit(NamedTuple):
    """Indices [the parameter's shape] uint8 and scales [blocks] fp32 of the first and the second moment."""

    exp_avg: Tensor
    exp_avg_scale: Tensor
    exp_avg_sq: Tensor
    exp_avg_sq_scale: Tensor


def new_moments(parameter: Tensor) -> Moments8bit:
    """Moments of zero."""
    blocks = -(-parameter.numel() // BLOCK)
    signed = torch.full(parameter.shape, _ZERO, dtype=torch.uint8, device=parameter.device)
    scale = torch.zeros(blocks, device=parameter.device)
    return Moments8bit(signed, scale, torch.zeros_like(signed), scale.clone())


def adam8bit_step(parameter: Tensor, low: Tensor | None, grad: Tensor, moments: Moments8bit, rule: AdamWRule) -> None:
    """Update ``parameter`` and ``moments`` in place; ``low`` as in :func:`adamw_step`.

    The update itself uses the moments before they are rounded. Blocks run along the contiguous order of the elements.
    """
    assert parameter.dtype == (torch.float32 if low is None else torch.bfloat16), (parameter.dtype, low is None)
    kernels = library() if parameter.device.type == "cpu" and parameter.is_contiguous() else None
    if kernels is None or grad.dtype not in (torch.float32, torch.bfloat16):
        adam8bit_reference(parameter, low, grad, moments, rule)
        return
    numbers = (rule.lr, rule.beta1, rule.beta2, rule.eps, rule.weight_decay, *rule.corrections, rule.grad_scale)
    kernels.call(
        "adam8bit",
        grad.dtype,
        parameter,
        low,
        grad.contiguous(),
        moments.exp_avg,
        moments.exp_avg_sq,
        moments.exp_avg_scale,
        moments.exp_avg_sq_scale,
        parameter.numel(),
        *_tables(True),
        *_tables(False),
        *numbers,
    )


def adam8bit_reference(
    parameter: Tensor, low: Tensor | None, grad: Tensor, moments: Moments8bit, rule: AdamWRule
) -> None:
    """The plain twin."""
    exp_avg = dequantize(moments.exp_avg, moments.exp_avg_scale, signed=True)
    exp_avg_sq = dequantize(moments.exp_avg_sq, moments.exp_avg_sq_scale, signed=False)
    adamw_reference(parameter, low, grad, exp_avg, exp_avg_sq, rule)
    for values, indices, scale, signed in (
        (exp_avg, moments.exp_avg, moments.exp_avg_scale, True),
        (exp_avg_sq, moments.exp_avg_sq, moments.exp_avg_sq_scale, False),
    ):
        new_indices, new_scale = quantize(values, signed=signed)
        indices.copy_(new_indices)
        scale.copy_(new_scale)


def quantize(values: Tensor, *, signed: bool, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Indices (uint8, the shape of ``values``) of the nearest values, ties towards zero, and the blocks' scales."""
    flat = values.flatten()
    blocks = functional.pad(flat, (0, -len(flat) % block)).unflatten(0, (-1, block))
    scale = blocks.abs().amax(-1)
    magnitudes = blocks.abs() * (1 / scale.clamp_min(1e-38))[:, None]
    _, bounds, _ = _tables(signed)
    index = torch.bucketize(magnitudes, bounds[:-1].to(values.device))
    if signed:
        index = torch.where(blocks < 0, _ZERO - index.clamp_max(_ZERO), _ZERO + index)
    return index.flatten()[: len(flat)].view(values.shape).to(torch.uint8), scale


def dequantize(indices: Tensor, scale: Tensor, *, signed: bool, block: int = BLOCK) -> Tensor:
    """fp32 values."""
    table = dynamic_map(signed=signed).to(indices.device)
    scales = scale.repeat_interleave(block)[: indices.numel()].view(indices.shape)
    return table[indices.int()] * scales


@cache
def dynamic_map(*, signed: bool) -> Tensor:
    """The 256 values, ascending: 7 decades below 1, each cut evenly, twice as finely as the one below it; 0; and 1."""
    values = [0.0, 1.0]
    for decade in range(7):
        pieces = 2**decade if signed else 2 ** (decade + 1)
        borders = torch.linspace(0.1, 1, pieces + 1)
        middles = (10.0 ** (decade - 6) * ((borders[:-1] + borders[1:]) / 2)).tolist()
        values += middles + ([-middle for middle in middles] if signed else [])
    assert len(values) == 256, len(values)
    return torch.tensor(sorted(values))


@cache
def _tables(signed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Magnitudes, the midpoints between them (then infinity), and per key the index from which the kernel looks."""
    values = dynamic_map(signed=signed)[_ZERO if signed else 0 :].contiguous()
    bounds = torch.cat(((values[:-1] + values[1:]) / 2, torch.tensor([torch.inf])))
    keys = torch.arange(((_HIGHEST - _LOWEST) >> _KEY_SHIFT) + 1, dtype=torch.int32)
    starts = (_LOWEST + (keys << _KEY_SHIFT)).view(torch.float32)
    starts[0] = 0.0
    return values, bounds, torch.bucketize(starts, bounds[:-1]).to(torch.int32)
