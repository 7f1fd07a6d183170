"""Rules of positions as tables: frequencies for the lengths they hold for, and score biases."""

from __future__ import annotations

import torch
from torch import Tensor

from oarsmith.models.layout import Layout
from oarsmith.models.position import alibi_table, inverse_frequencies
from oarsmith.models.spec_position import (
    Alibi,
    DynamicScaling,
    LongScaling,
    Position,
    Rope,
    SteppedScaling,
    YarnScaling,
)
from oarsmith.native.program import Rotation
from oarsmith.native.weights import Weights


def bias_table(position: Position | None, max_positions: int) -> Tensor | None:
    """[heads, positions] of an ALiBi rule."""
    return alibi_table(position, max_positions, torch.device("cpu")) if isinstance(position, Alibi) else None


def rotation(position: Rope, max_positions: int, weights: Weights, *, of_blocks: bool) -> Rotation:
    """The rotation of a rule, by positions or by the second kind of them."""
    starts = _starts(position, max_positions)
    lengths = torch.tensor([max(start, 1) for start in starts])
    # The rules look at lengths only: one token for each.
    layout = Layout((), (), lengths - 1, lengths, lengths)
    sets = inverse_frequencies(position, layout).reshape(-1, position.dim // 2)
    if position.fp16_frequencies:
        sets = sets.half().float()
    scaling = position.scaling
    return Rotation(
        sets=weights.vector(sets),
        frequencies=position.dim // 2,
        adjacent=position.pairs == "adjacent",
        factor=scaling.attention_factor if isinstance(scaling, (YarnScaling, LongScaling)) else 1.0,
        starts=tuple(starts[: len(sets)]),
        follows="prompt" if isinstance(scaling, SteppedScaling) else "length",
        of_blocks=of_blocks,
    )


def _starts(rope: Rope, max_positions: int) -> list[int]:
    """The lengths from which on another set of frequencies holds."""
    match rope.scaling:
        case LongScaling(original_length=length):
            return [0, length + 1]
        case SteppedScaling(original_length=length):
            starts = [0]
            while length < max_positions:
                starts.append(length + 1)
                length *= 2
            return starts
        case DynamicScaling(original_length=length):
            return [0, *range(length + 1, max_positions + 1)]
        case _:
            return [0]
