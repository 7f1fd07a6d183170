"""What a family is, and the typed reading of ``config.json`` values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from oarsmith.errors import ModelError
from oarsmith.models.families.naming import Names, name_map
from oarsmith.models.names import NameMap
from oarsmith.models.spec import DecoderSpec
from oarsmith.models.spec_parts import Activation

StretchKind = Literal["linear", "ntk", "dynamic", "yarn"]


@dataclass(frozen=True, kw_only=True)
class Stretching:
    """How a family's ``config.json`` says that its context is stretched (see ``models/stretch.py``).

    Args:
        kinds: rules that other readers of the family's configs (transformers, the authors' code) follow.
        reason: why not the others.
        base: key of the rotation's base, in units of ``base_unit``, where no object of rope values has it.
        lengths: keys of the context's length; those that stand in a config grow with the context.
        grow_with: rules with which they do. With the others readers multiply the length by the factor themselves.
    """

    kinds: tuple[StretchKind, ...] = ("linear", "ntk", "dynamic", "yarn")
    reason: str = ""
    base: str = "rope_theta"
    base_unit: float = 1.0
    lengths: tuple[str, ...] = ("max_position_embeddings",)
    grow_with: tuple[StretchKind, ...] = ("ntk", "yarn")


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family: how its config becomes a spec, and what it calls its tensors.

    Args:
        matches: of several families with a model type in common, the first whose config this accepts is taken.
        inside: model types of larger models (image and text) whose ``text_config`` is one of this family.
        stretching: how its context is stretched, where it has rotary positions.
    """

    name: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    build: Callable[[Mapping[str, Any]], DecoderSpec]
    tensor_names: Names
    matches: Callable[[Mapping[str, Any]], bool] = lambda _: True
    inside: tuple[str, ...] = ()
    stretching: Stretching = Stretching()

    def names(self, spec: DecoderSpec) -> NameMap:
        """The operators between the family's files and a decoder of this spec."""
        return name_map(spec, self.tensor_names)


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

    def positive(self, key: str, default: float | None = None) -> float:
        """A number above zero."""
        value = self.number(key, default)
        if value <= 0:
            raise ModelError(f"{key} must be above zero, got {value:g}", where="config.json")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.config.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ModelError(f"{key} must be true or false, got {value!r}", where="config.json")
        return value

    def count(self, key: str, default: int) -> int:
        """An integer that may be zero."""
        value = self.config.get(key)
        return default if value is None else 0 if value == 0 and not isinstance(value, bool) else self.integer(key)

    def optional_integer(self, key: str) -> int | None:
        return None if self.config.get(key) is None else self.integer(key)

    def optional_number(self, key: str) -> float | None:
        return None if self.config.get(key) is None else self.number(key)

    def integers(self, key: str) -> tuple[int, ...] | None:
        """A list of integers, or None where the key is missing or null."""
        value = self.config.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or any(isinstance(item, bool) or not isinstance(item, int) for item in value):
            raise ModelError(f"{key} must be a list of integers, got {value!r}", where="config.json")
        return tuple(value)

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of finite numbers."""
        value = self.config.get(key)
        good = isinstance(value, list) and all(
            isinstance(item, (int, float)) and not isinstance(item, bool) and math.isfinite(item) for item in value
        )
        if not good:
            raise ModelError(f"{key} must be a list of numbers, got {str(value)[:80]}", where="config.json")
        return tuple(float(item) for item in value or ())

    def renamed(self, **names: str) -> ConfigReader:
        """The same config where a missing key may stand under another name (``hidden_size="n_embd"``)."""
        config = dict(self.config)
        for new, old in names.items():
            if config.get(new) is None and config.get(old) is not None:
                config[new] = config[old]
        return ConfigReader(config)

    def refuse(self, key: str, *known: object, fix: str) -> None:
        """Stop where ``key`` has a value that is not among ``known``; a missing or null one is.

        For options of the authors' code that this decoder does not have.
        """
        value = self.config.get(key)
        if value is not None and value not in known:
            raise ModelError(f"{key} {value!r} is not supported", where="config.json", fix=fix)

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
            "gelu_python": "gelu",
            "relu": "relu",
        }
        if value not in known:
            raise ModelError(
                f"unknown activation {value!r} in {keys[0]}", where="config.json", fix=f"known: {list(known)}"
            )
        return known[value]
