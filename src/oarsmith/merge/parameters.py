"""Values of a recipe's parameters: one number, a gradient over layers, or by parts of tensor names.

The language is mergekit's (https://github.com/arcee-ai/mergekit, docs/config_reference.md): a setting is a value, a
list of anchors that layers interpolate between, or a list of ``{filter, value}`` of which the first that fits counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from oarsmith.errors import ConfigError

Value = bool | float | int | str


@dataclass(frozen=True)
class Gradient:
    """Anchors spread evenly from the first layer to the last. Numbers are interpolated, others are the nearest."""

    anchors: tuple[Value, ...]

    def at(self, place: float) -> Value:
        """The value ``place`` of the way, 0 to 1."""
        last = len(self.anchors) - 1
        if any(isinstance(one, (bool, str)) for one in self.anchors):
            return self.anchors[round(place * last)]
        exact = place * last
        low = min(int(exact), last)
        part, high = exact - low, min(low + 1, last)
        return (1 - part) * float(self.anchors[low]) + part * float(self.anchors[high])


@dataclass(frozen=True)
class Choice:
    """A value for tensors whose names contain ``filter``; None: for all."""

    filter: str | None
    value: Value | Gradient


Setting = Value | Gradient | tuple[Choice, ...]
Settings = Mapping[str, Setting]


def read_setting(value: object, where: str) -> Setting:
    """A setting from YAML.

    Raises:
        ConfigError: it is none.
    """
    if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
        return tuple(_choice(one, f"{where}[{index}]") for index, one in enumerate(value))
    return _plain(value, where)


def _plain(value: object, where: str) -> Value | Gradient:
    if isinstance(value, list):
        if not value or any(isinstance(one, (list, dict)) or one is None for one in value):
            raise ConfigError("a gradient is a list of values, one an anchor", where=where, fix="write [0, 0.5, 1]")
        return Gradient(tuple(_value(one, where) for one in value))
    return _value(value, where)


def _value(value: object, where: str) -> Value:
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{value} is no number that weights can be made of", where=where, fix="give a finite number")
    if not isinstance(value, (bool, int, float, str)):
        raise ConfigError(f"{value!r} is not a value", where=where, fix="give a number, a list, or {filter, value}")
    return value


def _choice(entry: Mapping[str, Any], where: str) -> Choice:
    unknown = sorted(set(entry) - {"filter", "value"})
    if unknown or "value" not in entry:
        what = f"unknown key {unknown[0]!r}" if unknown else "there is no value"
        raise ConfigError(what, where=where, fix="an entry is {filter: part of a tensor's name, value: ...}")
    chosen = entry.get("filter")
    if chosen is not None and not isinstance(chosen, str):
        raise ConfigError(f"{chosen!r} is no part of a name", where=where, fix="quote it")
    return Choice(None if chosen == "*" else chosen, _plain(entry["value"], f"{where}.value"))


def settings_values(settings: Settings) -> dict[str, Any]:
    """Settings as YAML has them."""
    return {name: _written(setting) for name, setting in settings.items()}


def _written(setting: Setting) -> Any:
    if isinstance(setting, Gradient):
        return list(setting.anchors)
    if isinstance(setting, tuple):
        return [{"filter": one.filter or "*", "value": _written(one.value)} for one in setting]
    return setting


def value_of(setting: Setting, name: str, place: float) -> Value | None:
    """What a setting says of a tensor; None: nothing.

    Args:
        name: of the tensor that is written.
        place: of its layer in its slice, 0 to 1.
    """
    if isinstance(setting, tuple):
        fitting = next((one for one in setting if one.filter is None or one.filter in name), None)
        if fitting is None:
            return None
        setting = fitting.value
    return setting.at(place) if isinstance(setting, Gradient) else setting


@dataclass(frozen=True)
class Parameter:
    """A parameter of a method.

    Attributes:
        name: in recipes.
        kind: of its values; whole numbers are floats too.
        default: None: it must be given.
        per_model: each model may have its own.
        least, most: bounds, inclusive.
        words: those that it can be, where it is a word.
    """

    name: str
    kind: type
    default: Value | None = None
    per_model: bool = False
    least: float = -math.inf
    most: float = math.inf
    words: tuple[str, ...] = ()

    def checked(self, value: Value | None, where: str) -> Value:
        """The value in its kind; the default where there is none.

        Raises:
            ConfigError: of another kind, out of bounds, or missing.
        """
        if value is None:
            if self.default is None:
                raise ConfigError(f"'{self.name}' is required", where=where, fix=f"give parameters: {self.name}: ...")
            return self.default
        if self.kind is bool:
            if isinstance(value, (bool, int)) and value in (0, 1):
                return bool(value)
            raise ConfigError(f"{self.name} = {value!r}: must be true or false", where=where, fix="correct it")
        if self.kind is str:
            if value not in self.words:
                wanted = " or ".join(self.words)
                raise ConfigError(f"{self.name} = {value!r}: must be {wanted}", where=where, fix="correct it")
            return value
        if isinstance(value, str):
            value = _number(value)
        if isinstance(value, (bool, str)) or (self.kind is int and int(value) != value):
            wanted = "a whole number" if self.kind is int else "a number"
            raise ConfigError(f"{self.name} = {value!r}: must be {wanted}", where=where, fix="correct it")
        if not self.least <= value <= self.most:
            limits = f"from {self.least:g}" if self.most == math.inf else f"in [{self.least:g}, {self.most:g}]"
            raise ConfigError(f"{self.name} = {value:g}: must be {limits}", where=where, fix="correct it")
        return self.kind(value)


def _number(word: str) -> Value:
    """YAML reads 1e-5 as a word."""
    try:
        found = float(word)
    except ValueError:
        return word
    return found if math.isfinite(found) else word


def look_up(layers: Iterable[Settings], parameter: str, name: str, place: float) -> Value | None:
    """What the first of some settings that has an answer says of a tensor.

    Args:
        layers: from the most special (a source of a slice) to the most general (the recipe).
    """
    for settings in layers:
        if parameter in settings:
            found = value_of(settings[parameter], name, place)
            if found is not None:
                return found
    return None
