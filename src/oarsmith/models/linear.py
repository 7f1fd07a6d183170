"""The linear maps of the decoder. Shapes: T tokens, I in features, O out features, E experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from oarsmith import kernels
from oarsmith.kernels.coded import CodedWeight
from oarsmith.models.spec_parts import LinearSpec


class Linear(nn.Module):
    """y_TO = x_TI W_OI^T + b_O. Rewrites subclass it, keep ``weight`` and ``bias``, and add their own parameters."""

    def __init__(self, spec: LinearSpec) -> None:
        super().__init__()
        self.spec = spec
        leading = () if spec.experts is None else (spec.experts,)
        self.weight = nn.Parameter(torch.empty(*leading, spec.out_features, spec.in_features))
        self.bias = nn.Parameter(torch.empty(*leading, spec.out_features)) if spec.bias else None

    def weight_filled(self) -> None:
        """The weight has just been read from a checkpoint. A rewrite may now keep it in another form."""

    @property
    def wants_codes(self) -> bool:
        """Whether it takes a quantized checkpoint's codes instead of the floats they stand for."""
        return False

    def take_codes(self, weights: Sequence[CodedWeight]) -> None:
        """The weight, or those of all experts, as a quantized checkpoint has it."""
        raise NotImplementedError(type(self).__name__)

    def forward(self, x_TI: Tensor) -> Tensor:
        return kernels.linear(x_TI, self.weight, self.bias)


class ExpertLinear(Linear):
    """E maps side by side, weight [E, O, I]: the first ``counts[0]`` rows of x go through the first, and so on."""

    def forward(self, x_TI: Tensor, counts: Sequence[int] = ()) -> Tensor:
        # unbind, not indexing: the backward of an index would allocate all experts' gradients once for each expert.
        weights = self.weight.unbind()
        biases = [None] * len(weights) if self.bias is None else self.bias.unbind()
        parts = zip(x_TI.split(list(counts)), weights, biases, strict=True)
        # A graph must not depend on whether an expert has rows.
        every = torch.compiler.is_compiling()
        return torch.cat([functional.linear(x, weight, bias) for x, weight, bias in parts if every or len(x)])


def build_linear(spec: LinearSpec) -> Linear:
    """The module for a spec: plain, or what its rewrite builds."""
    if spec.rewrite is not None:
        return spec.rewrite.build(spec)
    return Linear(spec) if spec.experts is None else ExpertLinear(spec)
