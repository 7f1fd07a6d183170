"""The rows of ``generate --input_file`` as prompts: what is asked, and what the row says the answer should be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oarsmith.data import fields
from oarsmith.data.conversations import to_conversation
from oarsmith.data.records import Record, read_records
from oarsmith.errors import DataError

Message = dict[str, Any]


@dataclass(frozen=True)
class PromptRow:
    """One row.

    Attributes:
        prompt: a text (the only kind that can be continued raw), or the messages up to the one to answer.
        tools: function schemas of the row.
        context: further variables of the chat template.
        reference: the answer the row holds; never shown to the model.
        where: file:line.
    """

    prompt: str | list[Message]
    where: str
    tools: tuple[dict[str, Any], ...] | None = None
    context: Mapping[str, Any] = field(default_factory=dict)
    reference: str | None = None

    def messages(self, system: str | None) -> list[Message]:
        """The conversation to answer; ``system`` only where the row brings no system message."""
        turns = [{"role": "user", "content": self.prompt}] if isinstance(self.prompt, str) else self.prompt
        if system is None or turns[0]["role"] == "system":
            return turns
        return [{"role": "system", "content": system}, *turns]


def read_prompts(path: str) -> list[PromptRow]:
    """All rows of a file: a .txt file has a prompt on each line, the rest is what training reads, or ``prompt`` rows.

    Raises:
        DataError: a missing file, no rows, or a row that asks nothing, with file:line.
    """
    rows = [_row(record) for record in _records(path)]
    if not rows:
        raise DataError("the file has no rows", where=path, fix='write one {"prompt": "..."} a line')
    return rows


def _records(path: str) -> Iterator[Record]:
    if Path(path).suffix.lower() != ".txt" or not Path(path).is_file():
        yield from read_records(path)
        return
    try:
        # Not splitlines: U+2028 and its like are text, not ends of lines.
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"the file is not UTF-8 (byte {error.start})", where=path, fix="save it as UTF-8") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield Record({"prompt": line.rstrip("\r")}, f"{path}:{number}")


def _row(record: Record) -> PromptRow:
    value = fields.without_nulls(record.value)
    if "prompt" in value:
        return PromptRow(fields.text(record, "prompt", value["prompt"]), record.where)
    if "text" in value and not {"messages", "conversations", "src", "instruction"} & value.keys():
        return PromptRow(fields.text(record, "text", value["text"]), record.where)
    conversation = to_conversation(Record(_with_answer(value), record.where))
    messages = list(conversation.messages)
    reference = None
    if messages[-1]["role"] == "assistant":
        last = messages.pop()
        reference = None if last["content"] == _NO_ANSWER else last["content"]
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise DataError("the row asks nothing", where=record.where, fix="end it with a user's message")
    return PromptRow(messages, record.where, conversation.tools, conversation.context, reference)


# Stands in for the answer that the training formats demand and a row to be answered lacks.
_NO_ANSWER = "\x00"


def _with_answer(value: dict[str, Any]) -> dict[str, Any]:
    if "src" in value:
        src, tgt = value["src"], value.get("tgt", [])
        if isinstance(src, str):
            return {**value, "tgt": value.get("tgt", _NO_ANSWER)}
        if isinstance(src, list) and isinstance(tgt, list) and len(tgt) == len(src) - 1:
            return {**value, "tgt": [*tgt, _NO_ANSWER]}
    elif "instruction" in value:
        return {**value, "output": value.get("output", _NO_ANSWER)}
    return value
