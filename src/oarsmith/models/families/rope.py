"""Rotary embeddings in ``config.json``: every spelling and scaling rule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from oarsmith.errors import ModelError
from oarsmith.models.families.base import ConfigReader
from oarsmith.models.spec_position import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongScaling,
    Rope,
    RopeScaling,
    YarnScaling,
)


def read_rope(
    read: ConfigReader,
    dim: int,
    theta: float = 10000.0,
    *,
    partial: float = 1.0,
    pairs: Literal["half", "adjacent"] = "half",
    layer_type: str | None = None,
) -> Rope:
    """Rope in either spelling: ``rope_theta`` and ``rope_scaling``, or transformers 5's ``rope_parameters``.

    Args:
        partial: share of the head that turns, unless the config says (``partial_rotary_factor``).
        layer_type: which entry to read where ``rope_parameters`` has one for each type of layer.
    """
    raw = rope_mapping(read)
    if layer_type is not None and isinstance(raw.get(layer_type), Mapping):
        raw = raw[layer_type]
    scaling = ConfigReader(raw)
    base = scaling.number("rope_theta", read.number("rope_theta", theta))
    partial = scaling.number("partial_rotary_factor", read.number("partial_rotary_factor", partial))
    turned = int(dim * partial)
    return Rope(dim=turned, theta=base, scaling=_read_scaling(scaling, read, turned), pairs=pairs)


def context_length(read: ConfigReader, default: int = 2048) -> int:
    """Tokens the model is made for: what the config states, times the factor of a rule that stretches it.

    ``max_position_embeddings`` is the stretched length with llama3 and longrope, and the original one with the others.
    """
    stated = read.integer("max_position_embeddings", default)
    raw = rope_mapping(read)
    if raw.get("rope_type", raw.get("type")) not in ("linear", "dynamic", "yarn"):
        return stated
    scaling = ConfigReader(raw)
    return max(stated, int(_trained_length(scaling, read, stated) * scaling.number("factor")))


def rope_mapping(read: ConfigReader) -> Mapping[str, Any]:
    """The object that holds the scaling rule, under either name; empty where there is none.

    Where both are there ``rope_scaling`` counts, as in transformers: model cards say to add it to stretch the context.
    """
    raw = read.config.get("rope_scaling") or read.config.get("rope_parameters") or {}
    if not isinstance(raw, Mapping):
        raise ModelError(f"rope_scaling must be an object, got {raw!r}", where="config.json")
    return raw


def _read_scaling(scaling: ConfigReader, read: ConfigReader, dim: int) -> RopeScaling | None:
    kind = scaling.config.get("rope_type", scaling.config.get("type", "default"))
    trained = _trained_length(scaling, read, read.integer("max_position_embeddings", 2048))
    match kind:
        case "default":
            return None
        case "linear":
            return LinearScaling(factor=scaling.number("factor"))
        case "dynamic":
            length = read.integer("max_position_embeddings", 2048)
            return DynamicScaling(factor=scaling.number("factor"), original_length=length)
        case "longrope" | "su":
            return _long(scaling, read, dim)
        case "llama3":
            return Llama3Scaling(
                factor=scaling.number("factor"),
                low_freq_factor=scaling.number("low_freq_factor"),
                high_freq_factor=scaling.number("high_freq_factor"),
                original_length=trained,
            )
        case "yarn":
            return YarnScaling(
                factor=scaling.number("factor"),
                original_length=trained,
                beta_fast=scaling.number("beta_fast", 32.0),
                beta_slow=scaling.number("beta_slow", 1.0),
                attention_factor=_yarn_attention_factor(scaling),
                truncate=scaling.flag("truncate", True),
            )
    raise ModelError(
        f"unknown rope scaling {kind!r}",
        where="config.json: rope_scaling",
        fix="known: linear, dynamic, llama3, yarn, longrope",
    )


def _trained_length(scaling: ConfigReader, read: ConfigReader, longest: int) -> int:
    """``original_max_position_embeddings``; beside the scaling rule it goes before the one inside."""
    key = "original_max_position_embeddings"
    return read.integer(key, scaling.integer(key, longest))


def _yarn_attention_factor(scaling: ConfigReader) -> float:
    if scaling.config.get("attention_factor") is not None:
        return scaling.number("attention_factor")
    factor = scaling.number("factor")

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if scaling.config.get("mscale") and scaling.config.get("mscale_all_dim"):
        return mscale(scaling.number("mscale")) / mscale(scaling.number("mscale_all_dim"))
    return mscale(1.0)


def _long(scaling: ConfigReader, read: ConfigReader, dim: int) -> LongScaling:
    """LongRoPE of Phi-3: the original context may stand beside ``rope_scaling``; their ratio is the factor."""
    lists = {key: scaling.numbers(key) for key in ("short_factor", "long_factor")}
    for key, values in lists.items():
        if len(values) != dim // 2 or min(values) <= 0:
            raise ModelError(
                f"{key} must hold {dim // 2} positive numbers, one for each frequency, got {len(values)}",
                where="config.json: rope_scaling",
            )
    longest = read.integer("max_position_embeddings")
    original = _trained_length(scaling, read, longest)
    factor = scaling.number("factor", longest / original)
    attention = scaling.optional_number("attention_factor")
    if attention is None:
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    short, long = lists["short_factor"], lists["long_factor"]
    return LongScaling(short=short, long=long, original_length=original, attention_factor=attention)
