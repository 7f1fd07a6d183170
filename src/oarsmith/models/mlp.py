"""Dense feed-forward parts. Shapes: T tokens, D hidden, I intermediate."""

from __future__ import annotations

from torch import Tensor, nn

from oarsmith import kernels
from oarsmith.models.linear import build_linear
from oarsmith.models.spec_parts import MLP, Activation, ClampedSwiGLU, GatedMLP


class GatedFeedForward(nn.Module):
    def __init__(self, spec: GatedMLP) -> None:
        super().__init__()
        self.activation = spec.activation
        self.gate_up = build_linear(spec.gate_up)
        self.down = build_linear(spec.down)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down(gated(self.gate_up(x_TD), self.activation))


class FeedForward(nn.Module):
    def __init__(self, spec: MLP) -> None:
        super().__init__()
        self.activation = spec.activation
        self.up = build_linear(spec.up)
        self.down = build_linear(spec.down)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down(kernels.activation(self.up(x_TD), self.activation))


def gated(gate_up: Tensor, activation: Activation | ClampedSwiGLU) -> Tensor:
    """[T, 2I], gate first, to [T, I]."""
    if isinstance(activation, ClampedSwiGLU):
        gate, up = gate_up.chunk(2, dim=-1)
        gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
        return gate * (gate * activation.alpha).sigmoid() * (up + 1)
    return kernels.gated_activation(gate_up, activation)
