"""Calls from JSON values, from Python's call syntax and from texts typed by a schema."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Schemas = Mapping[str, Mapping[str, Any]]
"""JSON schemas of the arguments of functions, by name."""


@dataclass(frozen=True)
class ToolCall:
    """A call of a function; ``arguments``: JSON text of an object."""

    name: str
    arguments: str


def call_of(name: Any, arguments: Any) -> ToolCall | None:
    """A call; arguments that are JSON text are unwrapped. None: they are no object, or there is no name."""
    if not isinstance(name, str) or not name.strip():
        return None
    if isinstance(arguments, str):
        arguments = json_of(arguments) if arguments.strip() else {}
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        return None
    try:
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, RecursionError):
        return None
    # Half a character of UTF-16 stays escaped: it cannot be sent.
    if not _is_unicode(name):
        return None
    return ToolCall(name.strip(), text if _is_unicode(text) else json.dumps(arguments))


def json_of(text: str) -> Any:
    """The value of a JSON text; None: it is none. Line breaks within texts are taken, as models write them."""
    try:
        return json.loads(text, strict=False, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def calls_of_json(text: str | None, *, explicit: bool = False) -> list[ToolCall] | None:
    """Calls of an object with name and arguments (or parameters), or of a list of such; None: something is no call.

    Args:
        explicit: each must name its arguments.
    """
    value = None if text is None else json_of(text)
    items = value if isinstance(value, list) else [value]
    calls = [_call_of_item(item, explicit) for item in items]
    found = [call for call in calls if call is not None]
    return found if found and len(found) == len(calls) else None


def _call_of_item(item: Any, explicit: bool) -> ToolCall | None:
    if isinstance(item, dict) and isinstance(item.get("function"), dict):
        item = item["function"]
    if not isinstance(item, dict):
        return None
    name = next((item[key] for key in ("name", "tool_name") if key in item), None)
    given = [item[key] for key in ("arguments", "parameters") if key in item]
    if explicit and not given:
        return None
    return call_of(name, given[0] if given else {})


def calls_of_python(text: str) -> list[ToolCall] | None:
    """Calls of ``f(a=1)`` or ``[f(a=1), g()]``, with constants for arguments; None: it is something else."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    nodes = tree.elts if isinstance(tree, ast.List) else [tree]
    calls = [_call_of_node(node) for node in nodes]
    found = [call for call in calls if call is not None]
    return found if found and len(found) == len(calls) else None


def _call_of_node(node: ast.expr) -> ToolCall | None:
    if not isinstance(node, ast.Call) or node.args or any(word.arg is None for word in node.keywords):
        return None
    try:
        arguments = {word.arg: ast.literal_eval(word.value) for word in node.keywords}
        return call_of(ast.unparse(node.func), arguments)
    except (ValueError, TypeError, RecursionError):
        return None


def typed(text: str, name: str, parameter: str, schemas: Schemas) -> Any:
    """A parameter's value that stands as bare text: of the kind its schema says, else JSON where it is JSON."""
    properties = schemas.get(name, {}).get("properties")
    schema = properties.get(parameter) if isinstance(properties, Mapping) else None
    if isinstance(schema, Mapping) and schema.get("type") == "string":
        return text
    value = json_of(text)
    return text if value is None and text.strip() != "null" else value


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)
