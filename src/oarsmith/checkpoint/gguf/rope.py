"""Rotary embeddings: GGUF metadata and factor tensors <-> config.json."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from oarsmith.checkpoint.gguf.metadata import Metadata
from oarsmith.errors import CheckpointError

ROPE_FACTORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
FACTOR_TENSORS = (ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS)
_LLAMA3_DEFAULT = (8192, 1.0, 4.0)  # original context, low and high frequency factor of every released Llama 3.x
_TOLERANCE = 1e-4  # relative; the factors are stored as float32


@dataclass(frozen=True)
class RopeStyle:
    """How a family's config.json describes its rotary embedding.

    Attributes:
        theta: key of the base.
        default_theta: base where nothing says one.
        partial: share of a head that is rotated, where config.json does not say; None: heads are rotated whole.
        mla: only ``qk_rope_head_dim`` of a head is rotated, and YaRN scales the softmax too (DeepSeek).
        local: key of the sliding layers' base (Gemma 3).
    """

    theta: str = "rope_theta"
    default_theta: float = 10000.0
    partial: float | None = None
    mla: bool = False
    local: str | None = None


PLAIN_ROPE = RopeStyle()


def rope_to_config(metadata: Metadata, style: RopeStyle, *, head: int) -> dict[str, Any]:
    """``rope_theta``, ``rope_scaling`` and so on.

    Raises:
        CheckpointError: a scaling type without a counterpart, or factors that no llama3 rule produces.
    """
    base = metadata.real("rope.freq_base", style.default_theta)
    rotated = metadata.whole("rope.dimension_count", head if style.partial is None else int(head * style.partial))
    config: dict[str, Any] = {style.theta: int(base) if base.is_integer() and style.theta != "rope_theta" else base}
    if style.local is not None:
        config[style.local] = metadata.real("rope.freq_base_swa", 10000.0)
    if style.partial is not None:
        config["partial_rotary_factor"] = rotated / head
    elif rotated != head and not style.mla:
        raise metadata.error("rope.dimension_count", f"{rotated} differs from the head size {head}: not supported")
    scaling = _read_scaling(metadata, style, base=base, rotated=rotated)
    if scaling is not None:
        config["rope_scaling"] = scaling
        if scaling["rope_type"] == "longrope":
            config["original_max_position_embeddings"] = metadata.whole("rope.scaling.original_context_length")
    return config


def _read_scaling(metadata: Metadata, style: RopeStyle, *, base: float, rotated: int) -> dict[str, Any] | None:
    kind = metadata.optional("rope.scaling.type") or "none"
    if metadata.has(LONG_FACTORS) or metadata.has(SHORT_FACTORS):
        return {
            "rope_type": "longrope",
            "short_factor": _factors(metadata, SHORT_FACTORS, rotated),
            "long_factor": _factors(metadata, LONG_FACTORS, rotated),
        }
    if metadata.has(ROPE_FACTORS):
        return _read_llama3(metadata, base=base, rotated=rotated)
    if kind == "none":
        old_factor = metadata.optional("rope.scale_linear")  # before GGUF had scaling types
        return {"rope_type": "linear", "factor": old_factor} if old_factor not in (None, 1.0) else None
    factor = metadata.real("rope.scaling.factor", 1.0)
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor} if factor != 1.0 else None
    if kind != "yarn":
        raise metadata.error("rope.scaling.type", f"{kind!r} is not supported; known are none, linear, yarn")
    return _read_yarn(metadata, style, factor)


def _factors(metadata: Metadata, name: str, rotated: int) -> list[float]:
    if not metadata.has(name):
        raise CheckpointError(f"the tensor {name} is missing", where=str(metadata.file.path))
    values = metadata.file.read(metadata.file.tensors[name], torch.float32).reshape(-1)
    if values.numel() != rotated // 2:
        raise metadata.error(name, f"{values.numel()} rotary factors for {rotated} rotated dimensions")
    return [float(str(value)) for value in values.numpy()]  # the shortest decimal that names the float32


def _read_yarn(metadata: Metadata, style: RopeStyle, factor: float) -> dict[str, Any]:
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
    log_multiplier = "yarn_log_multiplier"
    if style.mla and metadata.optional(f"rope.scaling.{log_multiplier}") is not None:
        # convert_hf_to_gguf.py writes a tenth of it.
        scale = round(metadata.real(f"rope.scaling.{log_multiplier}") * 10, 6)
        scaling |= {"mscale": scale, "mscale_all_dim": scale}
    for key in ("yarn_ext_factor", "yarn_attn_factor", *(() if style.mla else (log_multiplier,))):
        if metadata.optional(f"rope.scaling.{key}") not in (None, 1.0):
            raise metadata.error(f"rope.scaling.{key}", "this YaRN variant is not supported")
    return scaling


def llama3_factors(base: float, rotated: int, factor: float, original: float, low: float, high: float) -> torch.Tensor:
    """llama.cpp's rope_freqs.weight for Llama 3's rule: what each frequency is divided by. float64 [rotated / 2]."""
    wavelengths = _wavelengths(base, rotated)
    smooth = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def _wavelengths(base: float, rotated: int) -> torch.Tensor:
    return 2 * math.pi * base ** (torch.arange(0, rotated, 2, dtype=torch.float64) / rotated)


def _read_llama3(metadata: Metadata, *, base: float, rotated: int) -> dict[str, Any]:
    """The rule's four numbers, found from its values.

    Between the plateaus 1/factors is a straight line over 1/wavelength, so two points there give original/(high - low)
    and low/(high - low); scaling all three numbers changes nothing, so low = 1 fixes them.
    """
    factors = torch.tensor(_factors(metadata, ROPE_FACTORS, rotated), dtype=torch.float64)
    wavelengths = _wavelengths(base, rotated)
    factor = round(float(factors.max()), 4)
    candidates = [_LLAMA3_DEFAULT]
    inner = ((factors > 1 + _TOLERANCE) & (factors < factor * (1 - _TOLERANCE))).nonzero().reshape(-1)
    smooth = (1 / factors - 1 / factor) / (1 - 1 / factor) if factor > 1 else factors
    if inner.numel() and factor > 1:  # with the usual frequency factors one point is enough
        low, high = _LLAMA3_DEFAULT[1:]
        candidates.append((round(float(wavelengths[inner[0]] * (low + (high - low) * smooth[inner[0]]))), low, high))
    if inner.numel() >= 2 and factor > 1:
        first, last = int(inner[0]), int(inner[-1])
        slope = (smooth[first] - smooth[last]) / (1 / wavelengths[first] - 1 / wavelengths[last])
        offset = slope / wavelengths[first] - smooth[first]
        if offset > 0:
            candidates.append((round(float(slope / offset)), 1.0, round(float(1 / offset + 1), 4)))
    for original, low, high in candidates:
        expected = llama3_factors(base, rotated, factor, original, low, high)
        if torch.allclose(expected, factors, rtol=_TOLERANCE, atol=0):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    raise metadata.error("rope_freqs", "the rotary factors follow no llama3 rule; other rules are not supported")
