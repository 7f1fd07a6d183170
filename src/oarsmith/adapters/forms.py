"""Forms in which frozen weights are kept: as they are, or in fewer bits.

A form makes a tuple of tensors of a weight W [O, I], computes x W^T and dy W with them, and gives W back as far as it
is kept.

Shapes: T tokens, I in features, O out features, E experts.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from oarsmith.kernels.int8 import Int8Weight, int8_backward, int8_forward, quantize_weight, rotate, rotation_size
from oarsmith.kernels.remake import recipe_of

Parts = tuple[Tensor, ...]


class WeightForm(Protocol):
    """How a frozen weight is kept. Instances are frozen dataclasses or without state.

    Attributes:
        names: of the tensors a weight becomes. The first one is the module's ``weight``, the others are buffers.
    """

    @property
    def names(self) -> tuple[str, ...]: ...

    def keep(self, weight_OI: Tensor) -> Parts:
        """W in this form."""

    def dense(self, parts: Parts, in_features: int) -> Tensor:
        """W [O, I] in fp32 as far as it is kept."""

    def rows(self, parts: Parts, start: int, stop: int, in_features: int) -> Parts:
        """Rows of W in this form."""

    def forward(self, x_TI: Tensor, parts: Parts, bias_O: Tensor | None) -> Tensor:
        """x W^T + b of contiguous x, in its dtype, outside of autograd."""

    def backward(self, dy_TO: Tensor, parts: Parts, in_features: int) -> Tensor:
        """dy W of contiguous dy, in its dtype, outside of autograd."""


class Dense:
    """As it is."""

    names = ("weight",)

    def keep(self, weight_OI: Tensor) -> Parts:
        return (weight_OI,)

    def dense(self, parts: Parts, in_features: int) -> Tensor:
        return parts[0].float()

    def rows(self, parts: Parts, start: int, stop: int, in_features: int) -> Parts:
        return (parts[0][start:stop],)

    def forward(self, x_TI: Tensor, parts: Parts, bias_O: Tensor | None) -> Tensor:
        return functional.linear(x_TI, parts[0], bias_O)

    def backward(self, dy_TO: Tensor, parts: Parts, in_features: int) -> Tensor:
        return dy_TO @ parts[0]


class Int8Rows:
    """8 bits with a scale a row, multiplied in 8 bits in both passes (``kernels/int8.py``)."""

    names = ("weight", "scale")

    def keep(self, weight_OI: Tensor) -> Parts:
        return tuple(quantize_weight(weight_OI))

    def dense(self, parts: Parts, in_features: int) -> Tensor:
        return rotate(parts[0].float() * parts[1][:, None], rotation_size(in_features))

    def rows(self, parts: Parts, start: int, stop: int, in_features: int) -> Parts:
        return parts[0][start:stop], parts[1][start:stop]

    def forward(self, x_TI: Tensor, parts: Parts, bias_O: Tensor | None) -> Tensor:
        return int8_forward(x_TI, Int8Weight(*parts), bias_O)

    def backward(self, dy_TO: Tensor, parts: Parts, in_features: int) -> Tensor:
        return int8_backward(dy_TO, Int8Weight(*parts))


DENSE: WeightForm = Dense()
INT8_ROWS: WeightForm = Int8Rows()


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
        xa = flat @ a.t()
        y = form.forward(flat, parts, bias)
        y.addmm_(xa, b.t())
        ctx.save_for_backward(xa, a, b, *parts, *recipe.inputs)
        ctx.make, ctx.num_parts, ctx.has_bias, ctx.form = recipe.make, len(parts), bias is not None, form
        return y.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        xa, a, b, *rest = ctx.saved_tensors
        parts, inputs = tuple(rest[: ctx.num_parts]), rest[ctx.num_parts :]
        x = ctx.make(*inputs).reshape(-1, a.shape[1])
        flat = dy.reshape(-1, dy.shape[-1]).contiguous()
        dxa = flat @ b
        dx = None
        if ctx.needs_input_grad[0]:
            dx = ctx.form.backward(flat, parts, a.shape[1]).addmm_(dxa, a).unflatten(0, dy.shape[:-1])
        d_bias = flat.sum(0) if ctx.has_bias and ctx.needs_input_grad[1] else None
        # A plain weight that trains beside its adapter.
        d_parts: list[Tensor | None] = [None] * ctx.num_parts
        if ctx.form is DENSE and ctx.needs_input_grad[5]:
            d_parts[0] = flat.t() @ x
        return dx, d_bias, dxa.t() @ x, flat.t() @ xa, None, *d_parts
