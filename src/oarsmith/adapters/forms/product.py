"""Products with a frozen weight in any form, on their own and beside a low-rank update.

Shapes: T tokens, I in features, O out features, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from oarsmith.adapters.forms.form import DENSE, Parts, WeightForm
from oarsmith.kernels.low_rank import thin_product
from oarsmith.kernels.remake import recipe_of


def product(x: Tensor, parts: Parts, bias_O: Tensor | None, form: WeightForm) -> Tensor:
    """x W^T + b with a frozen W, differentiable in x and b."""
    if form is DENSE:
        return functional.linear(x, parts[0], bias_O)
    out: Tensor = _Product.apply(x, bias_O, form, *parts)
    return out


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, form: WeightForm, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(*parts)
        ctx.form, ctx.in_features, ctx.has_bias = form, x.shape[-1], bias is not None
        return form.forward(x.reshape(-1, x.shape[-1]).contiguous(), parts, bias).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        flat = dy.reshape(-1, dy.shape[-1]).contiguous()
        dx = None
        if ctx.needs_input_grad[0]:
            dx = ctx.form.backward(flat, ctx.saved_tensors, ctx.in_features).unflatten(0, dy.shape[:-1])
        d_bias = flat.sum(0) if ctx.has_bias and ctx.needs_input_grad[1] else None
        return dx, d_bias, None, *[None] * len(ctx.saved_tensors)


def low_rank_product(
    x: Tensor, parts: Parts, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, form: WeightForm
) -> Tensor:
    """x W^T + b + (x A^T) B^T, differentiable in all but a W that is kept in fewer bits."""
    out: Tensor = _LowRankProduct.apply(x, bias_O, a_RI, b_OR, form, *parts)
    return out


class _LowRankProduct(torch.autograd.Function):
    """x W^T + b + (x A^T) B^T with the additions fused into the products and no gradient for a frozen W."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, form: WeightForm, *parts: Tensor
    ) -> Tensor:
        flat, recipe = x.reshape(-1, x.shape[-1]).contiguous(), recipe_of(x)
        y, xa = form.low_rank_forward(flat, parts, bias, a, b)
        ctx.save_for_backward(xa, a, b, *parts, *recipe.inputs)
        ctx.make, ctx.num_parts, ctx.has_bias, ctx.form = recipe.make, len(parts), bias is not None, form
        return y.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        xa, a, b, *rest = ctx.saved_tensors
        parts, inputs = tuple(rest[: ctx.num_parts]), rest[ctx.num_parts :]
        x = ctx.make(*inputs).reshape(-1, a.shape[1])
        flat = dy.reshape(-1, dy.shape[-1]).contiguous()
        dx = None
        if ctx.needs_input_grad[0]:
            dx, dxa = ctx.form.low_rank_backward(flat, parts, a, b)
            dx = dx.unflatten(0, dy.shape[:-1])
        else:
            dxa = flat @ b
        d_bias = flat.sum(0) if ctx.has_bias and ctx.needs_input_grad[1] else None
        # A plain weight that trains beside its adapter.
        d_parts: list[Tensor | None] = [None] * ctx.num_parts
        if ctx.form is DENSE and ctx.needs_input_grad[5]:
            d_parts[0] = flat.t() @ x
        # Contiguous: gradients are summed in the order in which they lie, which every step must share.
        return dx, d_bias, thin_product(dxa, x), thin_product(xa, flat).t().contiguous(), None, *d_parts
