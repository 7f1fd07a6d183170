"""Normalisation layers. Shapes: T tokens, D features of the normalised axis (always the last), H heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from oarsmith import kernels
from oarsmith.models.spec_parts import LayerNormSpec, NormSpec, RMSNormSpec


class RMSNorm(nn.Module):
    def __init__(self, spec: RMSNormSpec) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(spec.size))

    def forward(self, x_TD: Tensor) -> Tensor:
        return kernels.rms_norm(x_TD, self.weight, self.spec.eps, self.spec.unit_offset)


class LayerNorm(nn.Module):
    def __init__(self, spec: LayerNormSpec) -> None:
        super().__init__()
        self.spec = spec
        shape = (spec.size,) if spec.heads is None else (spec.heads, spec.size)
        self.weight = nn.Parameter(torch.empty(shape)) if spec.affine else None
        self.bias = nn.Parameter(torch.empty(shape)) if spec.affine and spec.bias else None

    def forward(self, x_TD: Tensor) -> Tensor:
        if self.spec.heads is None:
            return functional.layer_norm(x_TD, (self.spec.size,), self.weight, self.bias, self.spec.eps)
        assert self.weight is not None, "norms of single heads have weights"
        y_THD = functional.layer_norm(x_TD, (self.spec.size,), eps=self.spec.eps) * self.weight
        return y_THD if self.bias is None else y_THD + self.bias


def build_norm(spec: NormSpec) -> RMSNorm | LayerNorm:
    match spec:
        case RMSNormSpec():
            return RMSNorm(spec)
        case LayerNormSpec():
            return LayerNorm(spec)
