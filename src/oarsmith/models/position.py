"""Rotary positions: frequencies of each scaling rule, and the cos/sin tables of a batch.

Shapes: T tokens, F = rotary dim / 2 frequencies.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from oarsmith.models.spec import DynamicScaling, LinearScaling, Llama3Scaling, Rope, YarnScaling


def rope_tables(rope: Rope, positions_T: Tensor, lengths_T: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [T, F] in float32.

    Args:
        positions_T: position of each token in its own document.
        lengths_T: current total length of the document each token belongs to (dynamic scaling depends on it; in cached
            decoding it grows, and keys already cached keep the base they were rotated with, as in the original code).
    """
    with torch.autocast(device_type=positions_T.device.type, enabled=False):
        freq_TF = inverse_frequencies(rope, lengths_T)
        angle_TF = positions_T[:, None].float() * freq_TF
        factor = rope.scaling.attention_factor if isinstance(rope.scaling, YarnScaling) else 1.0
        return angle_TF.cos() * factor, angle_TF.sin() * factor


def inverse_frequencies(rope: Rope, lengths_T: Tensor) -> Tensor:
    """Radians per position, float32: [F], or [T, F] where the rule depends on the document's length."""
    exponent_F = torch.arange(0, rope.dim, 2, dtype=torch.int64, device=lengths_T.device).float() / rope.dim
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
        case DynamicScaling():
            return _dynamic(exponent_F, rope, rope.scaling, lengths_T)


def _dynamic(exponent_F: Tensor, rope: Rope, scaling: DynamicScaling, lengths_T: Tensor) -> Tensor:
    length_T = lengths_T.clamp_min(scaling.original_length).float()
    growth_T = scaling.factor * length_T / scaling.original_length - (scaling.factor - 1)
    base_T = rope.theta * growth_T ** (rope.dim / (rope.dim - 2))
    return 1.0 / (base_T[:, None] ** exponent_F)


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
