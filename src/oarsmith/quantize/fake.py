"""Fake quantization for training: numbers are rounded on the way forward, and gradients pass as if they were not.

Straight through (Bengio et al. 2013, arXiv 1308.3432): the gradient of rounding is 1, and 0 of what a fixed range cuts.
PACT (Choi et al. 2018, arXiv 1805.06085, equations 1 to 3, here with two sides) learns where to cut.

Shapes: O out features, I in features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from oarsmith.quantize.activations import round_activations
from oarsmith.quantize.grid import Grid, Steps, quantize
from oarsmith.models.rounding import Activations

_LARGEST = 127


def fake_weight(weight_OI: Tensor, grid: Grid, steps: Steps | None = None) -> Tensor:
    """The weight on its grid, on steps of its range as it is now unless others are given; gradients pass unchanged.

    Weights that given steps cut keep their gradient, so that they can come back.
    """
    with torch.no_grad():
        rounded_OI = quantize(weight_OI, grid, steps).dense().to(weight_OI.dtype)
    return weight_OI + (rounded_OI - weight_OI).detach()


def fake_activations(x: Tensor, how: Activations, scale: Tensor | None = None) -> Tensor:
    """Activations as the scheme rounds them. A static scale's range cuts, and what it cuts has no gradient."""
    with torch.no_grad():
        rounded = round_activations(x, how, scale)
    if scale is not None and how.static:
        largest = scale * (_LARGEST if how.code == "int" else torch.finfo(torch.float8_e4m3fn).max)
        x = torch.minimum(torch.maximum(x, -largest.to(x.dtype)), largest.to(x.dtype))
    return x + (rounded - x).detach()


class _PactFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, clip: Tensor) -> Tensor:
        ctx.save_for_backward(x, clip)
        scale = clip.float() / _LARGEST
        cut = torch.minimum(torch.maximum(x.float(), -clip.float()), clip.float())
        return ((cut / scale).round_() * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (grad,) = grads
        x, clip = ctx.saved_tensors  # type: ignore[attr-defined]
        inside = x.abs() < clip
        outside = torch.where(inside, 0.0, grad.float() * x.sign().float()).sum()
        return torch.where(inside, grad, 0.0), outside.to(clip.dtype)


class Pact(nn.Module):
    """Activations cut at a learned limit, and rounded to int8 within it.

    Args:
        limit: where it starts; PaddleNLP's is 20.

    The gradient of x passes within the limit; the limit's is what arrives at activations beyond it, by their signs.
    """

    def __init__(self, limit: float = 20.0) -> None:
        super().__init__()
        self.clip = nn.Parameter(torch.tensor(limit))

    def forward(self, x: Tensor) -> Tensor:
        """Rounded activations, in the dtype of ``x``."""
        # A limit that learning pushed to zero or below would turn signs.
        result: Tensor = _PactFunction.apply(x, self.clip.clamp_min(1e-6))
        return result
