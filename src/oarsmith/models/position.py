"""Positions of a batch: rotations of queries and keys, and score biases. One table a rule and call, for all layers.

Shapes: T tokens, F = rotary dim / 2 frequencies, H heads, P positions, K head dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from oarsmith import kernels
from oarsmith.models.layout import Layout
from oarsmith.models.spec_position import (
    Alibi,
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongScaling,
    Position,
    Rope,
    SteppedScaling,
    TwoRowRope,
    YarnScaling,
)


@dataclass(frozen=True)
class Rotation:
    """cos and sin [T, F] of each part of a head: one for all of it, or one for each half."""

    parts: tuple[tuple[Tensor, Tensor], ...]
    adjacent: bool

    def __call__(self, x_THK: Tensor) -> Tensor:
        pieces = x_THK.chunk(len(self.parts), dim=-1)
        turned = [kernels.rope(x, *part, adjacent=self.adjacent) for x, part in zip(pieces, self.parts, strict=True)]
        return turned[0] if len(turned) == 1 else torch.cat(turned, -1)


@dataclass(frozen=True)
class PositionTables:
    """What the layers of one call look up."""

    rotations: dict[Position, Rotation]
    biases: dict[Position, Tensor]


def position_tables(positions: Iterable[Position], layout: Layout, training: bool) -> PositionTables:
    """Tables of every rule among ``positions`` (usually one)."""
    rotations: dict[Position, Rotation] = {}
    biases: dict[Position, Tensor] = {}
    for rule in set(positions):
        match rule:
            case Rope():
                table = rope_tables(rule, layout, layout.positions_T, training)
                rotations[rule] = Rotation((table,), rule.pairs == "adjacent")
            case TwoRowRope():
                assert layout.blocks_T is not None, "the model's visibility rule makes the second row"
                rows = layout.positions_T, layout.blocks_T
                tables = tuple(rope_tables(rule.rope, layout, row_T, training) for row_T in rows)
                rotations[rule] = Rotation(tables, rule.rope.pairs == "adjacent")
            case Alibi():
                # The kernel counts within a span, whatever the positions are.
                biases[rule] = alibi_table(rule, layout.most_keys, layout.positions_T.device)
    return PositionTables(rotations, biases)


def alibi_table(rule: Alibi, num_positions: int, device: torch.device) -> Tensor:
    """scale * slope * position [H, P] in fp32."""
    slopes_H = torch.tensor(rule.slopes, dtype=torch.float32, device=device)
    index_P = torch.arange(num_positions, device=device)
    bias_HP = (slopes_H.bfloat16()[:, None] * index_P).float() if rule.bf16 else slopes_H[:, None] * index_P
    return bias_HP if rule.scale == 1.0 else bias_HP * rule.scale


def rope_tables(rope: Rope, layout: Layout, positions_T: Tensor, training: bool) -> tuple[Tensor, Tensor]:
    """cos and sin [T, F] in float32.

    Some rules follow the current length of the document: it grows in cached decoding, and keys already cached keep the
    rotation they had, as in the original code.
    """
    with torch.autocast(device_type=positions_T.device.type, enabled=False):
        freq_TF = inverse_frequencies(rope, layout, training)
        if rope.fp16_frequencies:
            freq_TF = freq_TF.half().float()
        angle_TF = positions_T[:, None].float() * freq_TF
        factor = rope.scaling.attention_factor if isinstance(rope.scaling, (YarnScaling, LongScaling)) else 1.0
        return angle_TF.cos() * factor, angle_TF.sin() * factor


def inverse_frequencies(rope: Rope, layout: Layout, training: bool = False) -> Tensor:
    """Radians per position, float32: [F], or [T, F] where the rule depends on the document's length."""
    device = layout.lengths_T.device
    exponent_F = torch.arange(0, rope.dim, 2, dtype=torch.int64, device=device).float() / rope.dim
    freq_F = 1.0 / (rope.theta**exponent_F)
    match rope.scaling:
        case None:
            return freq_F
        case LinearScaling(factor=factor):
            return freq_F / factor
        case Llama3Scaling():
            return _llama3(freq_F, rope.scaling)
        case YarnScaling():
            return _yarn(freq_F, rope, rope.scaling)
        case LongScaling():
            return _long(freq_F, rope.scaling, layout.lengths_T)
        case DynamicScaling():
            return _with_base(exponent_F, rope, _dynamic_growth(rope.scaling, layout.lengths_T))
        case SteppedScaling():
            return freq_F if training else _with_base(exponent_F, rope, _steps(rope.scaling, layout.prompts_T))


def _with_base(exponent_F: Tensor, rope: Rope, growth_T: Tensor) -> Tensor:
    """NTK: the base times growth^(d / (d - 2)) keeps the slowest frequency's angle within what was trained."""
    base_T = rope.theta * growth_T ** (rope.dim / (rope.dim - 2))
    return 1.0 / (base_T[:, None] ** exponent_F)


def _dynamic_growth(scaling: DynamicScaling, lengths_T: Tensor) -> Tensor:
    length_T = lengths_T.clamp_min(scaling.original_length).float()
    return scaling.factor * length_T / scaling.original_length - (scaling.factor - 1)


def _steps(scaling: SteppedScaling, prompts_T: Tensor) -> Tensor:
    times_T = (prompts_T.double() / scaling.original_length).log2() + 1
    return (2 ** times_T.ceil() - 1).clamp_min(1).float()


def _long(freq_F: Tensor, scaling: LongScaling, lengths_T: Tensor) -> Tensor:
    short_F, long_F = (
        torch.tensor(f, dtype=torch.float32, device=freq_F.device) for f in (scaling.short, scaling.long)
    )
    beyond_T = lengths_T > scaling.original_length
    return torch.where(beyond_T[:, None], freq_F / long_F, freq_F / short_F)


def _llama3(freq_F: Tensor, scaling: Llama3Scaling) -> Tensor:
    wavelength_F = 2 * math.pi / freq_F
    longest = scaling.original_length / scaling.low_freq_factor
    shortest = scaling.original_length / scaling.high_freq_factor
    smooth_F = (scaling.original_length / wavelength_F - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    ramp_F = (1 - smooth_F) * freq_F / scaling.factor + smooth_F * freq_F
    scaled_F = torch.where(wavelength_F > longest, freq_F / scaling.factor, freq_F)
    between_F = (wavelength_F >= shortest) & (wavelength_F <= longest)
    return torch.where(between_F, ramp_F, scaled_F)


def _yarn(freq_F: Tensor, rope: Rope, scaling: YarnScaling) -> Tensor:
    def dimension_of(rotations: float) -> float:
        return (rope.dim * math.log(scaling.original_length / (rotations * 2 * math.pi))) / (2 * math.log(rope.theta))

    low, high = dimension_of(scaling.beta_fast), dimension_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    if low == high:
        high += 0.001  # the original's guard against a division by zero
    index_F = torch.arange(rope.dim // 2, dtype=torch.float32, device=freq_F.device)
    keep_F = 1 - ((index_F - low) / (high - low)).clamp(0, 1)
    return freq_F / scaling.factor * (1 - keep_F) + freq_F * keep_F
