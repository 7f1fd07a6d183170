"""Tool schemas and tool calls of a row in the one shape that chat templates read."""

from __future__ import annotations

import json
from typing import Any

from oarsmith.data import fields
from oarsmith.data.records import Record


def read_tools(record: Record, value: Any) -> list[dict[str, Any]]:
    """The `tools` field, a list or JSON text of one, as `{"type": "function", "function": {...}}` schemas; empty
    where there are none."""
    if value is None or value == "":
        return []
    given = fields.from_json(record, "tools", fields.text(record, "tools", value)) if isinstance(value, str) else value
    if given is None:
        return []
    if not isinstance(given, list):
        raise fields.bad_field(record, "tools", given, "a list of function schemas (or JSON text of one)")
    tools = []
    for number, item in enumerate(given):
        name = f"tools[{number}]"
        schema = fields.mapping(record, name, item, "a function schema")
        function = schema.get("function", schema)
        function = fields.mapping(record, f"{name}.function", function, "an object with a name")
        fields.text(record, f"{name}.name", function.get("name"))
        tools.append({"type": "function", "function": function})
    return tools


def read_tool_calls(record: Record, name: str, calls: list[Any], num_before: int) -> list[dict[str, Any]]:
    """Calls as `{"id", "type": "function", "function": {"name", "arguments": object}}`.

    Args:
        num_before: number of calls earlier in the conversation. A call without an id gets "call" and its number in
            five digits: nine letters and digits, which is what Mistral's templates insist on.
    """
    read = []
    for number, item in enumerate(calls):
        field = f"{name}[{number}]"
        call = fields.without_nulls(fields.mapping(record, field, item, "a call {name, arguments}"))
        function = fields.mapping(
            record, f"{field}.function", call.get("function", call), "an object {name, arguments}"
        )
        function_name = fields.text(record, f"{field}.name", function.get("name"))
        arguments = _arguments(record, f"{field}.arguments", function.get("arguments"))
        given_id = fields.optional_text(record, f"{field}.id", call.get("id"))
        call_id = f"call{num_before + number:05d}" if given_id is None else given_id
        read.append({"id": call_id, "type": "function", "function": {"name": function_name, "arguments": arguments}})
    return read


def _arguments(record: Record, name: str, value: Any) -> dict[str, Any]:
    """Arguments as an object, which most templates want; OpenAI's own shape is JSON text."""
    if value is None or value == "":
        return {}
    given = fields.from_json(record, name, value) if isinstance(value, str) else value
    arguments = fields.mapping(record, name, given, "an object (or JSON text of one)")
    fields.text(record, name, json.dumps(arguments, ensure_ascii=False))  # no half characters below
    return arguments
