"""The help text of a job's keys, generated from its class."""

from __future__ import annotations

import json
import textwrap

from .base import JobConfig, groups_of, value_choices, value_types
from .names import aliases_of

_KINDS = {
    bool: "true|false",
    int: "whole number",
    float: "number",
    str: "text",
    tuple: "list",
    list: "list",
    dict: "JSON object",
}


def kind_of(config_class: type[JobConfig], key: str) -> str:
    """What a value of the key looks like, in a word or two."""
    choices = value_choices(config_class, key)
    if choices:
        return "|".join(choices)
    types = value_types(config_class, key)
    return " or ".join(word for kind, word in _KINDS.items() if kind in types)


def shown(value: object) -> str:
    """A value as the user would write it."""
    if value is None:
        return "not given"
    if isinstance(value, (bool, tuple, list, dict)):
        return json.dumps(value, ensure_ascii=False)
    return str(value) if str(value).isprintable() and value != "" else repr(value)


def default_of(config_class: type[JobConfig], key: str) -> str:
    """The default of a key in words."""
    field = config_class.model_fields[key]
    return "required" if field.is_required() else shown(field.default)


def keys_help(config_class: type[JobConfig], width: int = 100) -> str:
    """All keys, by group: name, kind of value, default, description, other names."""
    lines: list[str] = []
    for title, keys in groups_of(config_class).items():
        lines += ["", f"{title}:"]
        for key in keys:
            lines += _key_help(config_class, key, width)
    return "\n".join(lines)


def _key_help(config_class: type[JobConfig], key: str, width: int) -> list[str]:
    text = config_class.model_fields[key].description or ""
    others = aliases_of(key, config_class.model_fields)
    if others:
        text += f" Also: {', '.join(others)}."
    head = f"  --{key} <{kind_of(config_class, key)}>  [{default_of(config_class, key)}]"
    if len(head) > width and (choices := value_choices(config_class, key)):
        head = f"  --{key} <word>  [{default_of(config_class, key)}]"
        text += f" One of: {', '.join(choices)}."
    return [head, *textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)]
