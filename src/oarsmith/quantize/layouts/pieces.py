"""Numbers, scales and zeros of a weight in the shapes that files have.

Shapes: O out, I in features, G groups of a row, B blocks of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from oarsmith.errors import ModelError
from oarsmith.quantize.grid import Grid, Quantized


def num_row_blocks(grid: Grid, out_features: int) -> int:
    """Runs of rows that share their scales."""
    return 1 if grid.rows is None else -(-out_features // grid.rows)


def block_scales(quantized: Quantized, where: str) -> Tensor:
    """Scales [B, G] of runs of rows that share them.

    Raises:
        ModelError: the rows of a run differ: they were not quantized as the rows of this tensor.
    """
    scale_OG, rows = quantized.steps.scale_OG, quantized.grid.rows
    if rows == 1:
        return scale_OG
    run = len(scale_OG) if rows is None else rows
    scale_BG = scale_OG[::run]
    if not torch.equal(scale_BG.repeat_interleave(run, 0)[: len(scale_OG)], scale_OG):
        raise ModelError(
            f"rows that share a scale in the file ({rows or 'all'} at a time) have several",
            where=where,
            fix="quantize the rows of each of the file's tensors by themselves",
        )
    return scale_BG


def whole_zeros(quantized: Quantized, where: str) -> Tensor:
    """Zeros [O, G] in uint8, the middle of a symmetric grid's range too.

    Raises:
        ModelError: a zero that is not one of the grid's numbers.
    """
    zero_OG, grid = quantized.steps.zero_OG, quantized.grid
    if zero_OG is None:
        return torch.full(quantized.steps.scale_OG.shape, grid.middle, dtype=torch.uint8)
    if not bool(((zero_OG == zero_OG.round()) & (zero_OG >= 0) & (zero_OG <= grid.largest)).all()):
        raise ModelError(
            f"a zero is not one of the numbers 0 to {grid.largest}, and no layout of integers has a place for it",
            where=where,
            fix="round the zeros before the weight is rounded",
        )
    return zero_OG.to(torch.uint8)
