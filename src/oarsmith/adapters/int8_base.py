"""Frozen linear maps in 8 bits, with or without LoRA on them: half the memory of bf16, and products twice as fast.

The arithmetic is ``kernels/int8.py``. Embedding, norms and head stay as they are, and so do adapters, whose files do
not tell what base they were trained on; merging takes the checkpoint's own weights.

Shapes: T tokens, I in features, O out features, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from oarsmith.adapters.lora import Lora, LoraLinear
from oarsmith.kernels.int8 import Int8Weight, int8_linear, quantize_weight
from oarsmith.models.families import Family
from oarsmith.models.linear import Linear
from oarsmith.models.spec import DecoderSpec, rewrite_linears
from oarsmith.models.spec_parts import LinearSpec

SpecRewrite = Callable[[Family, DecoderSpec], DecoderSpec]


@dataclass(frozen=True, kw_only=True)
class Int8Base:
    """Rewrites a linear map: its weight is held in 8 bits. ``adapter``: what sits on it."""

    adapter: Lora | None

    def build(self, spec: LinearSpec) -> Linear:
        return Int8Linear(spec) if self.adapter is None else Int8LoraLinear(spec, self.adapter)


def int8_rewrite(inner: SpecRewrite) -> SpecRewrite:
    """``inner``'s rewrite of a spec, then all linear maps of the layers in 8 bits from the moment they are loaded."""

    def rule(_: str, linear: LinearSpec) -> LinearSpec:
        assert linear.rewrite is None or isinstance(linear.rewrite, Lora), linear.rewrite
        return replace(linear, rewrite=Int8Base(adapter=linear.rewrite))

    return lambda family, spec: rewrite_linears(inner(family, spec), rule)


class Int8Linear(Linear):
    """A frozen linear map. ``weight`` is float until it has been filled, then int8, with ``scale`` [O] or [E, O]."""

    scale: Tensor | None

    def __init__(self, spec: LinearSpec) -> None:
        super().__init__(spec)
        self.register_buffer("scale", None)

    def weight_filled(self) -> None:
        """Round the weight to 8 bits."""
        self.weight, self.scale = _rounded(self.weight)

    def forward(self, x_TI: Tensor, counts: Sequence[int] = ()) -> Tensor:
        """``counts``: for stacked maps, how many rows of x go through each."""
        weights = _weights(self.weight, self.scale)
        if self.spec.experts is None:
            return int8_linear(x_TI, weights[0], self.bias)
        biases = [None] * len(weights) if self.bias is None else self.bias.unbind()
        parts = zip(x_TI.split(list(counts)), weights, biases, strict=True)
        return torch.cat([int8_linear(x, weight, bias) for x, weight, bias in parts if len(x)])


class Int8LoraLinear(LoraLinear):
    """A frozen linear map as above, with low-rank additions."""

    scale: Tensor | None

    def __init__(self, spec: LinearSpec, lora: Lora) -> None:
        super().__init__(spec, lora)
        self.register_buffer("scale", None)

    def weight_filled(self) -> None:
        """Round the weight to 8 bits."""
        self.weight, self.scale = _rounded(self.weight)

    def base_weights(self) -> Sequence[Int8Weight]:
        return _weights(self.weight, self.scale)


def _rounded(weight: Tensor) -> tuple[nn.Parameter, Tensor]:
    """The int8 values and scales of W [O, I] or [E, O, I]."""
    assert weight.is_floating_point(), f"{weight.dtype} weights have been rounded already"
    values, scale = quantize_weight(weight.flatten(0, -2))
    return nn.Parameter(values.view(weight.shape), requires_grad=False), scale.view(weight.shape[:-1])


def _weights(values: Tensor, scale: Tensor | None) -> list[Int8Weight]:
    """One for each map."""
    assert scale is not None, "the weight has not been loaded"
    if values.dim() == 2:
        return [Int8Weight(values, scale)]
    return [Int8Weight(*each) for each in zip(values.unbind(), scale.unbind(), strict=True)]
