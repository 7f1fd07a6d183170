"""LoRA: y = x W^T + scale * x A^T B^T on chosen projections (Hu et al. 2021); rsLoRA's scale (Kalajdzievski 2023).

Shapes: T tokens, I in features, O out features, R the ranks of all segments of a fused map together, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from oarsmith.kernels.int8 import Int8Weight, int8_backward, int8_forward, int8_linear
from oarsmith.kernels.remake import recipe_of
from oarsmith.models.decoder import Decoder
from oarsmith.models.linear import Linear
from oarsmith.models.spec_parts import LinearSpec

BaseWeight = Tensor | Int8Weight


@dataclass(frozen=True, kw_only=True)
class LoraSegment:
    """The adapter of one segment (of every expert, where maps are stacked): rank and the factor on its product."""

    name: str
    rank: int
    scale: float


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Rewrites a linear map: each listed segment gets its own A and B, all computed as one pair of products."""

    segments: tuple[LoraSegment, ...]
    dropout: float = 0.0

    def build(self, spec: LinearSpec) -> LoraLinear:
        return LoraLinear(spec, self)


def lora_scale(alpha: float, rank: int, rslora: bool) -> float:
    """alpha / r, or alpha / sqrt(r) for rsLoRA."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


class LoraLinear(Linear):
    """A linear map with low-rank additions on some of its segments.

    ``lora_A[name]`` [r, I] and ``lora_B[name]`` [segment size, r] are fp32 and trainable whatever the base's dtype:
    they are small, and updates are not lost to rounding. Products run in the base's dtype. Stacked maps have one such
    pair for each expert, along a leading axis.
    """

    def __init__(self, spec: LinearSpec, lora: Lora) -> None:
        super().__init__(spec)
        self.lora = lora
        lead = () if spec.experts is None else (spec.experts,)
        sizes = {segment.name: segment.size for segment in spec.segments}
        self.lora_A = nn.ParameterDict({s.name: torch.empty(*lead, s.rank, spec.in_features) for s in lora.segments})
        self.lora_B = nn.ParameterDict({s.name: torch.empty(*lead, sizes[s.name], s.rank) for s in lora.segments})

    def forward(self, x_TI: Tensor, counts: Sequence[int] = ()) -> Tensor:
        """``counts``: for stacked maps, how many rows of x go through each."""
        a, b = self.stacked(x_TI.dtype)
        if self.spec.experts is None:
            return self._adapted(x_TI, self.base_weights()[0], self.bias, a, b)
        biases = [None] * self.spec.experts if self.bias is None else self.bias.unbind()
        maps = zip(self.base_weights(), biases, a.unbind(), b.unbind(), strict=True)
        rows = zip(x_TI.split(list(counts)), maps, strict=True)
        return torch.cat([self._adapted(x, *weights) for x, weights in rows if len(x)])

    def base_weights(self) -> Sequence[BaseWeight]:
        """The weight [O, I] under the adapter, or that of each expert."""
        return [self.weight] if self.spec.experts is None else self.weight.unbind()

    def _adapted(
        self, x_TI: Tensor, weight_OI: BaseWeight, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor
    ) -> Tensor:
        if self.lora.dropout > 0 and self.training:
            if isinstance(weight_OI, Int8Weight):
                base = int8_linear(x_TI, weight_OI, bias_O)
            else:
                base = functional.linear(x_TI, weight_OI, bias_O)
            dropped_TI = functional.dropout(x_TI, self.lora.dropout)
            return base + functional.linear(functional.linear(dropped_TI, a_RI), b_OR)
        return _LoraProduct.apply(x_TI, weight_OI, bias_O, a_RI, b_OR)

    def stacked(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A of all segments stacked [R, I], and B with its scale as a block-diagonal matrix [O, R]; or [E, ...]."""
        by_name = {segment.name: segment for segment in self.lora.segments}
        rows = [self.lora_A[s.name] for s in self.spec.segments if s.name in by_name]
        blocks = [
            self.lora_B[s.name] * by_name[s.name].scale
            if s.name in by_name
            else torch.zeros(*self.weight.shape[:-2], s.size, 0, device=rows[0].device)
            for s in self.spec.segments
        ]
        if self.spec.experts is None:
            diagonal = torch.block_diag(*blocks)
        else:
            diagonal = torch.stack([torch.block_diag(*each) for each in zip(*blocks, strict=True)])
        return torch.cat(rows, -2).to(dtype), diagonal.to(dtype)

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """A from U(-1/sqrt(I), 1/sqrt(I)), B zero: training starts at the base model, as in the paper's code."""
        bound = 1 / math.sqrt(self.spec.in_features)
        for name in self.lora_A:
            shape = self.lora_A[name].shape
            self.lora_A[name].copy_(torch.empty(shape).uniform_(-bound, bound, generator=generator))
            self.lora_B[name].zero_()

    @torch.no_grad()
    def deltas(self) -> Iterator[tuple[str, tuple[EllipsisType, slice, slice], Tensor]]:
        """(segment, where it lies in the weight, scale * B A in fp32) for each adapted segment."""
        by_name = {segment.name: segment for segment in self.lora.segments}
        for segment, start, stop in self.spec.bounds():
            if segment.name in by_name:
                product = self.lora_B[segment.name].float() @ self.lora_A[segment.name].float()
                yield segment.name, (..., slice(start, stop), slice(None)), product * by_name[segment.name].scale


class _LoraProduct(torch.autograd.Function):
    """x W^T + b + (x A^T) B^T with the additions fused into the products and no gradient for a frozen W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: BaseWeight, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        flat, recipe = x.reshape(-1, x.shape[-1]).contiguous(), recipe_of(x)
        xa = flat @ a.t()
        y = (
            int8_forward(flat, weight, bias)
            if isinstance(weight, Int8Weight)
            else functional.linear(flat, weight, bias)
        )
        y.addmm_(xa, b.t())
        parts = tuple(weight) if isinstance(weight, Int8Weight) else (weight,)
        ctx.save_for_backward(xa, a, b, *parts, *recipe.inputs)
        ctx.make, ctx.num_parts, ctx.has_bias = recipe.make, len(parts), bias is not None
        return y.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        xa, a, b, *rest = ctx.saved_tensors
        weight, inputs = rest[: ctx.num_parts], rest[ctx.num_parts :]
        x = ctx.make(*inputs).reshape(-1, a.shape[1])
        flat = dy.reshape(-1, dy.shape[-1]).contiguous()
        dxa = flat @ b
        dx = None
        if ctx.needs_input_grad[0]:
            dx = int8_backward(flat, Int8Weight(*weight)) if len(weight) == 2 else flat @ weight[0]
            dx = dx.addmm_(dxa, a).unflatten(0, dy.shape[:-1])
        d_weight = flat.t() @ x if ctx.needs_input_grad[1] else None
        d_bias = flat.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return dx, d_weight, d_bias, dxa.t() @ x, flat.t() @ xa


def lora_modules(model: Decoder) -> Iterator[tuple[str, LoraLinear]]:
    """The adapted linear maps with their module paths."""
    for path, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield path, module


def attach(model: Decoder, seed: int) -> None:
    """Freeze the base and give every adapter fresh fp32 weights; the same seed gives the same adapter anywhere."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for _, module in lora_modules(model):
        for table in (module.lora_A, module.lora_B):
            for name in table:
                table[name] = nn.Parameter(torch.empty(table[name].shape, device=table[name].device))
        module.reset(generator)
