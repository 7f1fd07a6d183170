"""A linear map that keeps recipes of its input. Shapes: T tokens, I in features, O out features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from oarsmith.kernels.remake import recipe_of


def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """x W^T + b. In backward, x is made again where it can be (see ``remake.py``)."""
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and weight_OI.requires_grad):
        return functional.linear(x_TI, weight_OI, bias_O)
    return _Linear.apply(x_TI, weight_OI, bias_O)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        recipe = recipe_of(x)
        ctx.save_for_backward(weight, *recipe.inputs)
        ctx.make, ctx.has_bias = recipe.make, bias is not None
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, *inputs = ctx.saved_tensors
        flat = dy.reshape(-1, dy.shape[-1])
        dx = (flat @ weight).unflatten(0, dy.shape[:-1]) if ctx.needs_input_grad[0] else None
        d_weight = d_bias = None
        if ctx.needs_input_grad[1]:
            x = ctx.make(*inputs)
            d_weight = flat.t() @ x.reshape(-1, x.shape[-1])
        if ctx.has_bias and ctx.needs_input_grad[2]:
            d_bias = flat.sum(0)
        return dx, d_weight, d_bias
