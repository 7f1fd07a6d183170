"""8 bits with a scale a row, multiplied in 8 bits."""

from __future__ import annotations

from torch import Tensor

from oarsmith.adapters.forms.form import Parts, WeightForm
from oarsmith.kernels.int8 import Int8Weight, int8_backward, int8_forward, quantize_weight, rotate, rotation_size
from oarsmith.kernels.low_rank import low_rank_backward, low_rank_forward


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

    def low_rank_forward(
        self, x_TI: Tensor, parts: Parts, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor
    ) -> tuple[Tensor, Tensor]:
        return low_rank_forward(x_TI, Int8Weight(*parts), bias_O, a_RI, b_OR)

    def low_rank_backward(self, dy_TO: Tensor, parts: Parts, a_RI: Tensor, b_OR: Tensor) -> tuple[Tensor, Tensor]:
        return low_rank_backward(dy_TO, Int8Weight(*parts), a_RI, b_OR)


INT8_ROWS: WeightForm = Int8Rows()
