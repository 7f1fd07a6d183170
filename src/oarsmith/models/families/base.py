"""What a family is, and the reading of config values that all families share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from oarsmith.errors import ModelError
from oarsmith.models.names import NameMap
from oarsmith.models.spec import (
    Activation,
    DecoderSpec,
    DynamicScaling,
    LinearScaling,
    LinearSpec,
    Llama3Scaling,
    Rope,
    RopeScaling,
    Segment,
    YarnScaling,
)


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family: ``build(config) -> DecoderSpec`` and ``names(spec) -> NameMap``."""

    name: str
    description: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    build: Callable[[Mapping[str, Any]], DecoderSpec]
    names: Callable[[DecoderSpec], NameMap]


class ConfigReader:
    """Typed reading of ``config.json`` values, with errors that name the key."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.config.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise ModelError(f"{key} must be a positive integer, got {value!r}", where="config.json")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.config.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ModelError(f"{key} must be a finite number, got {value!r}", where="config.json")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.config.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ModelError(f"{key} must be true or false, got {value!r}", where="config.json")
        return value

    def optional_integer(self, key: str) -> int | None:
        return None if self.config.get(key) is None else self.integer(key)

    def activation(self, *keys: str, default: str | None = None) -> Activation:
        """The activation function under the first of ``keys`` that is set."""
        value = next((self.config[key] for key in keys if self.config.get(key) is not None), default)
        known: dict[Any, Activation] = {
            "silu": "silu",
            "swish": "silu",
            "gelu": "gelu",
            "gelu_new": "gelu_tanh",
            "gelu_pytorch_tanh": "gelu_tanh",
            "gelu_fast": "gelu_tanh",
            "relu": "relu",
        }
        if value not in known:
            raise ModelError(
                f"unknown activation {value!r} in {keys[0]}", where="config.json", fix=f"known: {list(known)}"
            )
        return known[value]


def fused(in_features: int, *segments: tuple[str, int], bias: bool = False) -> LinearSpec:
    """A linear map whose output rows are the named segments in order."""
    return LinearSpec(
        in_features=in_features, segments=tuple(Segment(name=name, size=size) for name, size in segments), bias=bias
    )


def read_rope(read: ConfigReader, dim: int, theta: float = 10000.0) -> Rope:
    """Rope in either spelling: ``rope_theta`` and ``rope_scaling``, or transformers 5's ``rope_parameters``."""
    raw = read.config.get("rope_parameters") or read.config.get("rope_scaling") or {}
    if not isinstance(raw, Mapping):
        raise ModelError(f"rope_scaling must be an object, got {raw!r}", where="config.json")
    scaling = ConfigReader(raw)
    base = scaling.number("rope_theta", read.number("rope_theta", theta))
    partial = scaling.number("partial_rotary_factor", read.number("partial_rotary_factor", 1.0))
    return Rope(dim=int(dim * partial), theta=base, scaling=_read_scaling(scaling, read))


def _read_scaling(scaling: ConfigReader, read: ConfigReader) -> RopeScaling | None:
    kind = scaling.config.get("rope_type", scaling.config.get("type", "default"))
    trained = scaling.integer("original_max_position_embeddings", read.integer("max_position_embeddings", 2048))
    match kind:
        case "default":
            return None
        case "linear":
            return LinearScaling(factor=scaling.number("factor"))
        case "dynamic":
            length = read.integer("max_position_embeddings", 2048)
            return DynamicScaling(factor=scaling.number("factor"), original_length=length)
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
        f"unknown rope scaling {kind!r}", where="config.json: rope_scaling", fix="known: linear, dynamic, llama3, yarn"
    )


def _yarn_attention_factor(scaling: ConfigReader) -> float:
    if scaling.config.get("attention_factor") is not None:
        return scaling.number("attention_factor")
    factor = scaling.number("factor")

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if scaling.config.get("mscale") and scaling.config.get("mscale_all_dim"):
        return mscale(scaling.number("mscale")) / mscale(scaling.number("mscale_all_dim"))
    return mscale(1.0)


def head_counts(read: ConfigReader, head_dim: int | None = None) -> tuple[int, int, int]:
    """(query heads, kv heads, head dim) with the field's defaults and their consistency checked."""
    hidden, heads = read.integer("hidden_size"), read.integer("num_attention_heads")
    kv_heads = read.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ModelError(f"{heads} heads cannot be shared by {kv_heads} key/value heads", where="config.json")
    if head_dim is None and read.config.get("head_dim") is None and hidden % heads:
        raise ModelError(f"hidden_size {hidden} is not a multiple of {heads} heads", where="config.json")
    return heads, kv_heads, read.integer("head_dim", head_dim or hidden // heads)


def window_size(read: ConfigReader) -> int | None:
    """``sliding_window``: null means none, a missing key the 4096 that the families' own defaults say."""
    return read.optional_integer("sliding_window") if "sliding_window" in read.config else 4096


def layer_windows(read: ConfigReader, num_layers: int, window: int | None, first_sliding: int) -> list[int | None]:
    """Each layer's sliding window: from ``layer_types`` where stated, else layers from ``first_sliding`` on slide."""
    types = read.config.get("layer_types")
    if types is None:
        return [window if index >= first_sliding else None for index in range(num_layers)]
    if len(types) != num_layers or set(types) - {"full_attention", "sliding_attention"}:
        raise ModelError(f"layer_types {types!r} does not describe {num_layers} layers", where="config.json")
    return [window if kind == "sliding_attention" else None for kind in types]
