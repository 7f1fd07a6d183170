"""The dataset formats, each read into messages in the OpenAI shape: one function a format."""

from __future__ import annotations

from typing import Any

from oarsmith.data import fields
from oarsmith.data.records import Record
from oarsmith.data.tool_calls import read_tool_calls, read_tools
from oarsmith.errors import DataError

Message = dict[str, Any]
Parsed = tuple[list[Message], list[dict[str, Any]], dict[str, Any]]
"""Messages, tools (empty: none) and template variables of a row."""

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "system": "system",
    "function_call": "function_call",
    "observation": "tool",
    "tool": "tool",
    "function_response": "tool",
}
_OPENAI_ROLES = {
    "system": "system",
    "developer": "system",  # OpenAI's newer name for it; open models' templates know only system
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}


def src_tgt(record: Record) -> Parsed:
    """PaddleNLP: `src` and `tgt`, strings or lists of the same length, and `context` with `system` and variables."""
    row = record.value
    asked = _strings(record, "src", row.get("src"))
    answered = _strings(record, "tgt", row.get("tgt"))
    if len(asked) != len(answered):
        what = f"'src' has {len(asked)} turns and 'tgt' {len(answered)}, expected as many of each"
        raise DataError(what, where=record.where, fix="give one tgt for each src")
    given = row.get("context")
    context = {} if given is None else dict(fields.mapping(record, "context", given, "an object"))
    messages = _system(record, "context.system", context.pop("system", None))
    for user, assistant in zip(asked, answered, strict=True):
        messages += _pair(user, assistant)
    return messages, [], fields.without_nulls(context)


def alpaca(record: Record) -> Parsed:
    """Alpaca: `instruction`, `output`, optional `input` (joined by a line break), `history` (pairs) and `system`."""
    row = record.value
    messages = _system(record, "system", row.get("system"))
    history = row.get("history")
    if history is not None and not isinstance(history, list):
        raise fields.bad_field(record, "history", history, "a list of [question, answer] pairs")
    for number, pair in enumerate(history or []):
        name = f"history[{number}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise fields.bad_field(record, name, pair, "a pair [question, answer]")
        messages += _pair(fields.text(record, f"{name}[0]", pair[0]), fields.text(record, f"{name}[1]", pair[1]))
    instruction = fields.text(record, "instruction", row.get("instruction"))
    further = fields.optional_text(record, "input", row.get("input"))
    question = f"{instruction}\n{further}" if further else instruction
    return messages + _pair(question, fields.text(record, "output", row.get("output"))), [], {}


def sharegpt(record: Record) -> Parsed:
    """ShareGPT: `conversations` of from/value, with function_call and observation turns, `system` and `tools` (JSON
    text).

    Rows that hold OpenAI messages (role/content) under this name are read as such.
    """
    row = record.value
    turns = fields.items(record, "conversations", row.get("conversations"), "a list of {from, value} turns")
    if isinstance(turns[0], dict) and "role" in turns[0] and "from" not in turns[0]:
        return openai_messages(Record({**row, "messages": turns}, record.where))
    messages = _system(record, "system", row.get("system"))
    num_calls, waiting = 0, []
    for number, turn in enumerate(turns):
        name = f"conversations[{number}]"
        given = fields.mapping(record, name, turn, "an object {from, value}")
        role = _role(record, f"{name}.from", given.get("from"), _SHAREGPT_ROLES)
        value = fields.text(record, f"{name}.value", given.get("value"))
        message: Message
        if role == "function_call":
            calls = fields.from_json(record, f"{name}.value", value)
            tool_calls = read_tool_calls(
                record, f"{name}.value", calls if isinstance(calls, list) else [calls], num_calls
            )
            num_calls += len(tool_calls)
            waiting = list(tool_calls)
            message = {"role": "assistant", "content": "", "tool_calls": tool_calls}
        elif role == "tool":
            message = {"role": "tool", "content": value, **_answered(waiting)}
        else:
            message = {"role": role, "content": value}
        messages.append(_with_weight(record, name, message, given.get("weight")))
    return messages, read_tools(record, row.get("tools")), {}


def openai_messages(record: Record, column: str = "messages") -> Parsed:
    """OpenAI: `messages` (or another `column`) of role/content with `tool_calls` and tool results, and `tools`."""
    row = record.value
    given_messages = fields.items(record, column, row.get(column), "a list of {role, content} messages")
    messages: list[Message] = []
    num_calls, waiting = 0, []
    for number, item in enumerate(given_messages):
        name = f"{column}[{number}]"
        given = fields.without_nulls(fields.mapping(record, name, item, "an object {role, content}"))
        role = _role(record, f"{name}.role", given.get("role"), _OPENAI_ROLES)
        message: Message = {**given, "role": role}
        calls = message.pop("tool_calls", None)
        if calls:
            if role != "assistant":
                what = f"field '{name}.tool_calls' stands in a {role} message; only an assistant calls tools"
                raise DataError(what, where=record.where, fix="move it to the assistant message")
            calls = fields.items(record, f"{name}.tool_calls", calls, "a list of tool calls")
            message["tool_calls"] = waiting = read_tool_calls(record, f"{name}.tool_calls", calls, num_calls)
            num_calls += len(waiting)
            waiting = list(waiting)
        message["content"] = _content(record, f"{name}.content", given.get("content"), has_calls=bool(calls))
        if "reasoning_content" in message:
            fields.text(record, f"{name}.reasoning_content", message["reasoning_content"])
        if role == "tool" and "tool_call_id" not in message:
            message |= {**_answered(waiting), **message}
        messages.append(_with_weight(record, name, message, message.pop("weight", None)))
    return messages, read_tools(record, row.get("tools")), {}


def document(record: Record) -> str:
    """Plain text from `text`, or from `src` where the format is asked for by name (PaddleNLP's `autoregressive`)."""
    name = "text" if "text" in record.value or "src" not in record.value else "src"
    return fields.text(record, name, record.value.get(name))


def _strings(record: Record, name: str, value: Any) -> list[str]:
    if isinstance(value, str):
        return [fields.text(record, name, value)]
    given = fields.items(record, name, value, "a string or a list of strings")
    return [fields.text(record, f"{name}[{number}]", item) for number, item in enumerate(given)]


def _pair(user: str, assistant: str) -> list[Message]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def _system(record: Record, name: str, value: Any) -> list[Message]:
    content = fields.optional_text(record, name, value)
    return [{"role": "system", "content": content}] if content else []


def _role(record: Record, name: str, value: Any, known: dict[str, str]) -> str:
    if not isinstance(value, str) or value not in known:
        raise fields.bad_field(record, name, value, f"one of {', '.join(known)}", fix="name the role so")
    return known[value]


def _content(record: Record, name: str, value: Any, *, has_calls: bool) -> str:
    if value is None and has_calls:
        return ""
    if isinstance(value, list):
        return "".join(_part(record, f"{name}[{number}]", part) for number, part in enumerate(value))
    return fields.text(record, name, value)


def _part(record: Record, name: str, part: Any) -> str:
    given = fields.mapping(record, name, part, 'a part {"type": "text", "text": ...}')
    if given.get("type") != "text":
        what = f"field '{name}' is a part of type {given.get('type')!r}; only text can be trained on"
        raise DataError(what, where=record.where, fix="remove parts that are not text")
    return fields.text(record, f"{name}.text", given.get("text"))


def _answered(waiting: list[dict[str, Any]]) -> Message:
    """Which call a tool result belongs to: the oldest one still without a result."""
    if not waiting:
        return {}
    call = waiting.pop(0)
    return {"tool_call_id": call["id"], "name": call["function"]["name"]}


def _with_weight(record: Record, name: str, message: Message, value: Any) -> Message:
    weight = fields.weight(record, f"{name}.weight", value)
    return message if weight is None else {**message, "weight": weight}
