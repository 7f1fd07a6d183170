"""Feed-forward parts. Shapes: T tokens, D hidden, I intermediate."""

from __future__ import annotations

from torch import Tensor, nn

from oarsmith import kernels
from oarsmith.models.linear import build_linear
from oarsmith.models.spec import FFN, MLP, GatedMLP


class GatedFeedForward(nn.Module):
    def __init__(self, spec: GatedMLP) -> None:
        super().__init__()
        self.activation = spec.activation
        self.gate_up = build_linear(spec.gate_up)
        self.down = build_linear(spec.down)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down(kernels.gated_activation(self.gate_up(x_TD), self.activation))


class FeedForward(nn.Module):
    def __init__(self, spec: MLP) -> None:
        super().__init__()
        self.activation = spec.activation
        self.up = build_linear(spec.up)
        self.down = build_linear(spec.down)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down(kernels.activation(self.up(x_TD), self.activation))


def build_ffn(spec: FFN) -> GatedFeedForward | FeedForward:
    match spec:
        case GatedMLP():
            return GatedFeedForward(spec)
        case MLP():
            return FeedForward(spec)
