"""Rotary embeddings: config.json -> GGUF metadata and factor tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from oarsmith.checkpoint.gguf.rope import LONG_FACTORS, ROPE_FACTORS, SHORT_FACTORS, RopeStyle, llama3_factors
from oarsmith.errors import CheckpointError

_CANNOT = "this model cannot be written as GGUF"


class _Scaling:
    """config.json's rope values in either spelling, with errors that name the key."""

    def __init__(self, config: Mapping[str, Any], style: RopeStyle, where: str) -> None:
        self.where = where
        nested = config.get("rope_parameters") or config.get("rope_scaling") or {}
        self._require_mapping(nested)
        local = nested.get("sliding_attention") or {}
        nested = nested.get("full_attention") or nested
        self._require_mapping(local)
        self._require_mapping(nested)
        self.values: dict[str, Any] = {**nested}
        self.theta = self._number(nested.get("rope_theta", config.get(style.theta, style.default_theta)), style.theta)
        partial = nested.get("partial_rotary_factor", config.get("partial_rotary_factor", style.partial))
        self.partial = self._number(1.0 if partial is None else partial, "partial_rotary_factor")
        if self.partial > 1:
            raise CheckpointError(f"{partial} is more than 1", where=f"{where}: partial_rotary_factor")
        self.local = self._number(local.get("rope_theta", config.get(style.local or "", 10000.0)), "rope_theta")
        self.kind = str(nested.get("rope_type", nested.get("type", "default"))).lower()
        original = nested.get("original_max_position_embeddings", config.get("original_max_position_embeddings"))
        self.values["original_max_position_embeddings"] = original

    def _require_mapping(self, value: Any) -> None:
        if not isinstance(value, Mapping):
            raise CheckpointError(f"{value!r} is not an object", where=f"{self.where}: rope_scaling")

    def _number(self, value: Any, key: str) -> float:
        if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
            raise CheckpointError(f"{value!r} is not a positive number", where=f"{self.where}: {key}")
        return float(value)

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key)
        return self._number(default if value is None else value, f"rope_scaling, {key}")

    def factors(self, key: str, count: int) -> Sequence[float]:
        values = self.values.get(key)
        if not isinstance(values, list) or len(values) != count:
            raise CheckpointError(f"must list {count} factors", where=f"{self.where}: rope_scaling, {key}")
        return [self._number(value, f"rope_scaling, {key}") for value in values]

    def refuse(self, what: str) -> CheckpointError:
        return CheckpointError(what, where=f"{self.where}: rope_scaling", fix=_CANNOT)


def rope_to_metadata(
    config: Mapping[str, Any],
    style: RopeStyle,
    dims: Mapping[str, int],
    factors: dict[str, Sequence[float]],
    notes: list[str],
    *,
    where: str,
) -> dict[str, Any]:
    """Metadata keys without the architecture's name. Factor tensors are added to ``factors``, remarks to ``notes``.

    Raises:
        CheckpointError: a scaling llama.cpp does not have.
    """
    scaling = _Scaling(config, style, where)
    rotated = dims["rope"] if style.mla else int(dims["head"] * scaling.partial)
    if style.partial is None and scaling.partial != 1.0:
        raise scaling.refuse(f"partial_rotary_factor {scaling.partial} is not known to llama.cpp for this architecture")
    metadata: dict[str, Any] = {"rope.dimension_count": rotated, "rope.freq_base": scaling.theta}
    if style.local is not None:
        metadata["rope.freq_base_swa"] = scaling.local
    match scaling.kind:
        case "default":
            pass
        case "linear":
            metadata |= {"rope.scaling.type": "linear", "rope.scaling.factor": scaling.number("factor")}
        case "dynamic":
            notes.append(f"llama.cpp has no dynamic rotary scaling: same results up to {dims['context']} tokens")
        case "llama3":
            rule = [scaling.number(f"{side}_freq_factor") for side in ("low", "high")]
            values = llama3_factors(
                scaling.theta,
                rotated,
                scaling.number("factor"),
                scaling.number("original_max_position_embeddings"),
                *rule,
            )
            factors[ROPE_FACTORS] = values.tolist()
        case "yarn":
            metadata |= _yarn(scaling, style, dims["context"])
        case "longrope" | "su":
            metadata |= _longrope(scaling, dims["context"])
            factors[LONG_FACTORS] = scaling.factors("long_factor", rotated // 2)
            factors[SHORT_FACTORS] = scaling.factors("short_factor", rotated // 2)
        case kind:
            raise scaling.refuse(f"llama.cpp has no rotary scaling {kind!r}")
    return metadata


def _yarn(scaling: _Scaling, style: RopeStyle, context: int) -> dict[str, Any]:
    factor = scaling.number("factor")
    metadata: dict[str, Any] = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": int(scaling.number("original_max_position_embeddings", context)),
    }
    for key in ("beta_fast", "beta_slow"):
        if scaling.values.get(key) is not None:
            metadata[f"rope.scaling.yarn_{key}"] = scaling.number(key)
    own = 1 + 0.1 * math.log(factor) if factor > 1 else 1.0  # what llama.cpp computes by itself
    if scaling.values.get("mscale") or scaling.values.get("mscale_all_dim"):
        one, all_dims = scaling.number("mscale", 1.0), scaling.number("mscale_all_dim", 1.0)
        if not style.mla:
            attention = (1 + 0.1 * one * math.log(factor)) / (1 + 0.1 * all_dims * math.log(factor))
            metadata["rope.scaling.attn_factor"] = attention / own
        elif one != all_dims:
            raise scaling.refuse(f"mscale {one} differs from mscale_all_dim {all_dims}, which llama.cpp cannot express")
        else:
            metadata["rope.scaling.yarn_log_multiplier"] = 0.1 * all_dims
    elif style.mla:
        raise scaling.refuse("YaRN without mscale_all_dim is not known to llama.cpp for this architecture")
    elif scaling.values.get("attention_factor") is not None:
        ratio = scaling.number("attention_factor") / own
        if not math.isclose(ratio, 1.0, rel_tol=1e-9):
            metadata["rope.scaling.attn_factor"] = ratio
    return metadata


def _longrope(scaling: _Scaling, context: int) -> dict[str, Any]:
    original = int(scaling.number("original_max_position_embeddings"))
    scale = scaling.number("factor", context / original)
    default = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    return {
        "rope.scaling.type": "longrope",
        "rope.scaling.original_context_length": original,
        "rope.scaling.attn_factor": scaling.number("attention_factor", default),
    }
