"""Products with a frozen weight and a low-rank update in one pass, bf16 on CPUs with AMX.

In PyTorch, the thin products of an update take a third as long as those of a small model's weights: each walks over the
inputs or the outputs once more. Here they share the passes, and the weight is kept in bf16 or in 8 bits.

Shapes: T tokens, I in features, O out features, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from oarsmith.kernels.int8 import Int8Weight, int8_backward, int8_forward, rotation_size
from oarsmith.kernels.select import Library, native_for

# Fewer rows do not pay for packing the weight.
_MIN_ROWS = 128
_STEP_BYTES = 2048
_LINE = 64

Weight = Tensor | Int8Weight
"""[O, I] in x's dtype, or in 8 bits."""


def low_rank_forward(
    x_TI: Tensor, weight: Weight, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor
) -> tuple[Tensor, Tensor]:
    """x W^T + b + (x A^T) B^T and x A^T, of contiguous x, outside of autograd; all but 8-bit W and b in x's dtype."""
    library = _tiles_for(x_TI, weight, a_RI, b_OR)
    if library is None:
        return low_rank_forward_reference(x_TI, weight, bias_O, a_RI, b_OR)
    bias_O = None if bias_O is None else bias_O.float()
    return _run(library, x_TI, weight, bias_O, (a_RI, b_OR), forward=True)


def low_rank_forward_reference(
    x_TI: Tensor, weight: Weight, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor
) -> tuple[Tensor, Tensor]:
    """The plain twin."""
    xa_TR = x_TI @ a_RI.t()
    if isinstance(weight, Int8Weight):
        y_TO = int8_forward(x_TI, weight, bias_O)
    else:
        y_TO = torch.nn.functional.linear(x_TI, weight, bias_O)
    return y_TO.addmm_(xa_TR, b_OR.t()), xa_TR


def low_rank_backward(dy_TO: Tensor, weight: Weight, a_RI: Tensor, b_OR: Tensor) -> tuple[Tensor, Tensor]:
    """dy W + (dy B) A and dy B, of contiguous dy, outside of autograd."""
    library = _tiles_for(dy_TO, weight, a_RI, b_OR)
    if library is None:
        return low_rank_backward_reference(dy_TO, weight, a_RI, b_OR)
    return _run(library, dy_TO, weight, None, (b_OR, a_RI), forward=False)


def low_rank_backward_reference(dy_TO: Tensor, weight: Weight, a_RI: Tensor, b_OR: Tensor) -> tuple[Tensor, Tensor]:
    """The plain twin."""
    dxa_TR = dy_TO @ b_OR
    dx_TI = int8_backward(dy_TO, weight) if isinstance(weight, Int8Weight) else dy_TO @ weight
    return dx_TI.addmm_(dxa_TR, a_RI), dxa_TR


def thin_product(a_TR: Tensor, x_TI: Tensor) -> Tensor:
    """a^T x [R, I] in x's dtype, summed in fp32, for an R that is much smaller than I."""
    library = _tiles_for(x_TI, a_TR)
    if library is None:
        return a_TR.t() @ x_TI
    (rows, rank), columns = a_TR.shape, x_TI.shape[1]
    out_RI = torch.empty(rank, columns)
    packed = _scratch(_up(rank, 32) * _up(rows, 32))
    library.call("thin_product", x_TI.dtype, a_TR, x_TI, out_RI, packed, rows, rank, columns)
    return out_RI.to(x_TI.dtype)


def _tiles_for(x_TK: Tensor, *others: Weight) -> Library | None:
    tensors = [other.values_OI if isinstance(other, Int8Weight) else other for other in others]
    library = native_for(x_TK)
    if library is None or not library.has_tile_products or x_TK.dtype != torch.bfloat16 or len(x_TK) < _MIN_ROWS:
        return None
    if any(tensor.dtype not in (torch.int8, x_TK.dtype) or not tensor.numel() for tensor in tensors):
        return None
    return library if all(tensor.is_contiguous() for tensor in (x_TK, *tensors)) else None


def _run(
    library: Library,
    x_TK: Tensor,
    weight: Weight,
    bias: Tensor | None,
    thin: tuple[Tensor, Tensor],
    *,
    forward: bool,
) -> tuple[Tensor, Tensor]:
    """``thin``: the two matrices in the order of their use."""
    values_OI = weight.values_OI if isinstance(weight, Int8Weight) else weight
    rows, inputs = x_TK.shape
    outputs, rank = values_OI.shape[0 if forward else 1], thin[0].shape[0 if forward else 1]
    out, inner_TR = x_TK.new_empty(rows, outputs), x_TK.new_empty(rows, rank)
    panels, sizes = _up(outputs, 32), (rows, inputs, outputs, rank)
    halves = _up(inputs, 32) * _up(rank, 32)
    if isinstance(weight, Int8Weight):
        # Backward, the second thin matrix is rotated first.
        packed = _scratch(panels * (_up(inputs, 64) + _up(rank, 32)) + halves + _up(2 * rank * outputs, _STEP_BYTES))
        tensors = (x_TK, values_OI, weight.scale_O, *thin, bias, out, inner_TR, packed)
        block = rotation_size(values_OI.shape[1])
        library.call("int8_product", x_TK.dtype, *tensors, *sizes, block, int(forward))
    else:
        packed = _scratch(panels * (_up(inputs, 32) + _up(rank, 32)) + halves)
        library.call(
            "low_rank_product", x_TK.dtype, x_TK, values_OI, *thin, bias, out, inner_TR, packed, *sizes, int(forward)
        )
    return out, inner_TR


def _scratch(steps: int) -> Tensor:
    return torch.empty(steps * _STEP_BYTES + _LINE, dtype=torch.uint8)


def _up(a: int, b: int) -> int:
    return -(-a // b)
