"""Rotary embedding scaling: from GGUF metadata and the llama3 factor tensor back to config.json's `rope_scaling`."""

from __future__ import annotations

import math
from typing import Any

import torch

from oarsmith.checkpoint.gguf_metadata import Metadata
from oarsmith.checkpoint.gguf_tensors import ROPE_FACTORS

_LLAMA3_DEFAULT = (8192, 1.0, 4.0)  # original context, low and high frequency factor of every released Llama 3.x
_TOLERANCE = 1e-4  # relative; the factors are stored as float32


def rope_scaling(metadata: Metadata, *, base: float, head: int) -> dict[str, Any] | None:
    """config.json's `rope_scaling`, or None for plain rotary embedding.

    Args:
        base: the rotary base (theta).
        head: size of a head; all of it is rotated.

    Raises:
        CheckpointError: a scaling type without a counterpart, or factors that no llama3 rule produces.
    """
    kind = metadata.optional("rope.scaling.type") or "none"
    if ROPE_FACTORS in metadata.file.tensors:
        return _llama3(metadata, base=base, head=head)
    if kind == "none":
        old_factor = metadata.optional("rope.scale_linear")  # before GGUF had scaling types
        return {"rope_type": "linear", "factor": old_factor} if old_factor not in (None, 1.0) else None
    factor = metadata.real("rope.scaling.factor", 1.0)
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor} if factor != 1.0 else None
    if kind != "yarn":
        raise metadata.error("rope.scaling.type", f"{kind!r} is not supported; known are none, linear, yarn")
    return _yarn(metadata, factor)


def _yarn(metadata: Metadata, factor: float) -> dict[str, Any]:
    original = metadata.whole("rope.scaling.original_context_length", metadata.whole("context_length"))
    scaling: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
    }
    for key in ("beta_fast", "beta_slow"):
        if metadata.optional(f"rope.scaling.yarn_{key}") is not None:
            scaling[key] = metadata.real(f"rope.scaling.yarn_{key}")
    attention = metadata.real("rope.scaling.attn_factor", 1.0)
    if attention != 1.0:  # llama.cpp multiplies this with YaRN's own 1 + 0.1 ln(factor); config.json holds the product
        scaling["attention_factor"] = attention * (1 + 0.1 * math.log(factor))
    for key in ("yarn_log_multiplier", "yarn_ext_factor", "yarn_attn_factor"):
        if metadata.optional(f"rope.scaling.{key}") not in (None, 1.0):
            raise metadata.error(f"rope.scaling.{key}", "this YaRN variant is not supported")
    return scaling


def _llama3_factors(wavelengths: torch.Tensor, factor: float, original: float, low: float, high: float) -> torch.Tensor:
    """llama.cpp's rope_freqs.weight for Llama 3's rule: what each frequency is divided by."""
    smooth = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def _llama3(metadata: Metadata, *, base: float, head: int) -> dict[str, Any]:
    """The rule's four numbers, found from its values.

    Between the plateaus 1/factors is a straight line over 1/wavelength, so two points there give original/(high - low)
    and low/(high - low); scaling all three numbers changes nothing, so low = 1 fixes them.
    """
    file = metadata.file
    tensor = file.tensors[ROPE_FACTORS]
    factors = file.read(tensor, torch.float32).double().reshape(-1)
    if factors.numel() != head // 2:
        raise metadata.error("rope_freqs", f"{factors.numel()} rotary factors for a head of {head}")
    wavelengths = 2 * math.pi * base ** (torch.arange(0, head, 2, dtype=torch.float64) / head)
    factor = round(float(factors.max()), 4)
    candidates = [_LLAMA3_DEFAULT]
    inner = ((factors > 1 + _TOLERANCE) & (factors < factor * (1 - _TOLERANCE))).nonzero().reshape(-1)
    if inner.numel() >= 2 and factor > 1:
        first, last = int(inner[0]), int(inner[-1])
        smooth = (1 / factors - 1 / factor) / (1 - 1 / factor)
        slope = (smooth[first] - smooth[last]) / (1 / wavelengths[first] - 1 / wavelengths[last])
        offset = slope / wavelengths[first] - smooth[first]
        if offset > 0:
            candidates.append((round(float(slope / offset)), 1.0, round(float(1 / offset + 1), 4)))
    for original, low, high in candidates:
        expected = _llama3_factors(wavelengths, factor, original, low, high)
        if torch.allclose(expected, factors, rtol=_TOLERANCE, atol=0):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    raise metadata.error("rope_freqs", "the rotary factors follow no llama3 rule; other rules are not supported")
