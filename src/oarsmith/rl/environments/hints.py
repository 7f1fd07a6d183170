"""JSON schemas of Python functions, from their type hints and docstrings."""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any, Literal, Union

from oarsmith.errors import ConfigError

_PLAIN: Mapping[Any, dict[str, Any]] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    type(None): {"type": "null"},
    dict: {"type": "object"},
    list: {"type": "array"},
    Any: {},
}
_PARAMETER = re.compile(r"^\s*(?:\*\*|:param\s+)?(\w+)\s*(?:\([^)]*\))?\s*:\s*(.+)$")


def schema_of(function: Callable[..., Any]) -> dict[str, Any]:
    """``{"type": "function", "function": {"name", "description", "parameters"}}``, as chat templates read tools.

    The first paragraph of the docstring is the description; lines ``name: text`` under ``Args:`` describe parameters.

    Raises:
        ConfigError: a parameter without a hint, or with one that JSON has no word for.
    """
    name = function.__name__
    try:
        hints = typing.get_type_hints(function)
    except (NameError, TypeError) as error:
        raise ConfigError(f"the type hints of the tool '{name}' cannot be read: {error}", where=name) from error
    said, described = _documented(inspect.getdoc(function) or "")
    properties, required = {}, []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise ConfigError(f"the tool '{name}' takes {parameter}, which has no name", fix="name its parameters")
        if parameter.name not in hints:
            what = f"the parameter '{parameter.name}' of the tool '{name}' has no type hint"
            raise ConfigError(what, where=name, fix=f"write {parameter.name}: str (or what it is)")
        schema = dict(_schema(hints[parameter.name], f"{name}.{parameter.name}"))
        if parameter.name in described:
            schema["description"] = described[parameter.name]
        properties[parameter.name] = schema
        if parameter.default is inspect.Parameter.empty:
            required.append(parameter.name)
    parameters: dict[str, Any] = {"type": "object", "properties": properties, "required": required}
    parameters["additionalProperties"] = False
    return {"type": "function", "function": {"name": name, "description": said, "parameters": parameters}}


def _documented(text: str) -> tuple[str, dict[str, str]]:
    said = " ".join(text.split("\n\n")[0].split())
    described: dict[str, str] = {}
    inside = False
    for line in text.splitlines():
        heading = line.strip().rstrip(":")
        if heading in ("Args", "Arguments", "Parameters"):
            inside = True
        elif heading in ("Returns", "Raises", "Yields"):
            inside = False
        elif (inside or line.lstrip().startswith(":param")) and (found := _PARAMETER.match(line)):
            described[found[1]] = found[2].strip()
    return said, described


def _schema(hint: Any, where: str) -> dict[str, Any]:
    if hint in _PLAIN:
        return dict(_PLAIN[hint])
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return {"enum": list(parts)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_schema(part, where) for part in parts]}
    if origin in (list, Sequence) and len(parts) == 1:
        return {"type": "array", "items": _schema(parts[0], where)}
    if origin in (dict, Mapping) and len(parts) == 2 and parts[0] is str:
        return {"type": "object", "additionalProperties": _schema(parts[1], where)}
    if isinstance(hint, type) and issubclass(hint, Enum):
        return {"enum": [member.value for member in hint]}
    what = f"{where} is a {hint}, which JSON has no word for"
    raise ConfigError(what, where=where, fix="use str, int, float, bool, list, dict, Literal or a union of these")
