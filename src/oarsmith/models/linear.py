"""The linear map of the decoder. Shapes: T tokens, I in features, O out features."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from oarsmith.models.spec import LinearSpec


class Linear(nn.Module):
    """y_TO = x_TI W_OI^T + b_O. Rewrites subclass it, keep ``weight`` and ``bias``, and add their own parameters."""

    def __init__(self, spec: LinearSpec) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(spec.out_features, spec.in_features))
        self.bias = nn.Parameter(torch.empty(spec.out_features)) if spec.bias else None

    def forward(self, x_TI: Tensor) -> Tensor:
        return functional.linear(x_TI, self.weight, self.bias)


def build_linear(spec: LinearSpec) -> Linear:
    """The module for a spec: plain, or what its rewrite builds."""
    return spec.rewrite.build(spec) if spec.rewrite is not None else Linear(spec)
