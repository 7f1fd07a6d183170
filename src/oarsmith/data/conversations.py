"""A row of any supported format as one conversation: roles, contents, tool calls and optional loss weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from oarsmith.data import formats
from oarsmith.data.fields import bad_field, shape
from oarsmith.data.records import Record
from oarsmith.errors import DataError

DatasetFormat = Literal["src_tgt", "alpaca", "sharegpt", "messages", "text"]

# The field that tells a format, in the order of the check.
_MARKS: tuple[tuple[str, DatasetFormat], ...] = (
    ("messages", "messages"),
    ("conversations", "sharegpt"),
    ("src", "src_tgt"),
    ("instruction", "alpaca"),
    ("text", "text"),
)
_PREFERENCE_FIELDS = ("chosen", "rejected", "response")


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages for the chat template, in order, or one plain document.

    Attributes:
        messages: dicts with `role` (system, user, assistant, tool) and `content`, where there are any also
            `tool_calls`, `tool_call_id`, `name`, `reasoning_content`, and `weight` (the loss weight of an assistant
            message; ours, never rendered).
        tools: function schemas offered to the model, None where there are none.
        context: further variables for the chat template.
        document: plain text to be learned as it is; then there are no messages.
        where: file:line of the row.
    """

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] | None = None
    context: Mapping[str, Any] = field(default_factory=dict)
    document: str | None = None
    where: str = ""


def detect_format(record: Record) -> DatasetFormat:
    """The format of a row by the fields it has.

    Raises:
        DataError: no known format, or preference data, which `sft` cannot use.
    """
    value = record.value
    if any(value.get(name) is not None for name in _PREFERENCE_FIELDS):
        found = ", ".join(name for name in _PREFERENCE_FIELDS if value.get(name) is not None)
        what = f"the row is preference data (it has {found}), not a conversation"
        raise DataError(
            what, where=record.where, fix="train on it with a preference method, or give question-answer rows"
        )
    filled = {name for name, item in value.items() if item is not None}
    for present in (filled, set(value)):  # a null field tells the format only where no other does
        for name, found_format in _MARKS:
            if name in present:
                return found_format
    raise DataError(
        f"the row's fields ({', '.join(map(str, list(value)[:8])) or 'none'}) fit no known format",
        where=record.where,
        fix="use src/tgt, instruction/output, conversations (from/value), messages (role/content) or text",
    )


def to_conversation(record: Record, dataset_format: DatasetFormat | None = None) -> Conversation:
    """Reads one row.

    Args:
        dataset_format: the format to read it as; None detects it for each row.

    Raises:
        DataError: with file:line, the field, what it is and what was expected.
    """
    if dataset_format is not None and dataset_format not in get_args(DatasetFormat):
        known = ", ".join(get_args(DatasetFormat))
        raise DataError(f"unknown dataset_format '{dataset_format}'", fix=f"use one of {known}, or leave it out")
    name = dataset_format or detect_format(record)
    if name == "text":
        return Conversation((), document=formats.document(record), where=record.where)
    readers: dict[str, Callable[[Record], formats.Parsed]] = {
        "src_tgt": formats.src_tgt,
        "alpaca": formats.alpaca,
        "sharegpt": formats.sharegpt,
        "messages": formats.openai_messages,
    }
    messages, tools, context = readers[name](record)
    assert messages, f"{record.where}: no messages from {shape(record.value)}"
    check_variables(record, "context", context)
    return Conversation(tuple(messages), tuple(tools) if tools else None, context, where=record.where)


def check_variables(record: Record, name: str, context: Any) -> None:
    """Refuses template variables that are none, or that the row itself says.

    Raises:
        DataError: with file:line and the field.
    """
    if not isinstance(context, dict):
        raise bad_field(record, name, context, "an object of template variables")
    reserved = {"messages", "tools", "add_generation_prompt"} & set(context)
    if reserved:
        what = f"field '{name}' sets {', '.join(sorted(reserved))}, which the chat template gets from the row itself"
        raise DataError(what, where=record.where, fix="rename it")
