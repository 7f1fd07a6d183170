"""What a form of a frozen weight is, and the plain one.

Shapes: T tokens, I in features, O out features, R rank.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor
from torch.nn import functional

from oarsmith.kernels.low_rank import low_rank_backward, low_rank_forward

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

    def low_rank_forward(
        self, x_TI: Tensor, parts: Parts, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor
    ) -> tuple[Tensor, Tensor]:
        """x W^T + b + (x A^T) B^T and x A^T, in x's dtype, outside of autograd; x, A and B are contiguous."""

    def low_rank_backward(self, dy_TO: Tensor, parts: Parts, a_RI: Tensor, b_OR: Tensor) -> tuple[Tensor, Tensor]:
        """dy W + (dy B) A and dy B, in the same way."""


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

    def low_rank_forward(
        self, x_TI: Tensor, parts: Parts, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor
    ) -> tuple[Tensor, Tensor]:
        return low_rank_forward(x_TI, parts[0], bias_O, a_RI, b_OR)

    def low_rank_backward(self, dy_TO: Tensor, parts: Parts, a_RI: Tensor, b_OR: Tensor) -> tuple[Tensor, Tensor]:
        return low_rank_backward(dy_TO, parts[0], a_RI, b_OR)


DENSE: WeightForm = Dense()
