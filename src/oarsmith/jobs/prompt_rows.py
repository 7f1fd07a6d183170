"""The rows of ``generate --input_file`` as prompts: what is asked, and what the row says the answer should be."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oarsmith.data import fields
from oarsmith.data.conversations import to_conversation
from oarsmith.data.records import Record, read_items
from oarsmith.errors import DataError

Message = dict[str, Any]


@dataclass(frozen=True)
class PromptRow:
    """One row that asks something.

    Attributes:
        prompt: a text (the only kind that can be continued raw), or the messages up to the one to answer.
        tools: function schemas of the row.
        context: further variables of the chat template.
        reference: the answer the row holds; never shown to the model.
        sampling: sampling keys of its own.
        where: file:line.
    """

    prompt: str | list[Message]
    where: str
    tools: tuple[dict[str, Any], ...] | None = None
    context: Mapping[str, Any] = field(default_factory=dict)
    reference: str | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The prompt to be continued as it is.

        Raises:
            DataError: it is a conversation.
        """
        if not isinstance(self.prompt, str):
            what = "a conversation cannot be continued raw"
            raise DataError(what, where=self.where, fix='give "prompt", or drop --raw')
        return self.prompt

    def messages(self, system: str | None) -> list[Message]:
        """The conversation to answer; ``system`` only where the row brings no system message."""
        turns = [{"role": "user", "content": self.prompt}] if isinstance(self.prompt, str) else self.prompt
        if system is None or turns[0]["role"] == "system":
            return turns
        return [{"role": "system", "content": system}, *turns]


@dataclass(frozen=True)
class InputRow:
    """A row as the file has it: its fields, or why it has none."""

    item: Record | DataError

    @property
    def digest(self) -> str:
        """32 hexadecimal digits that follow from the row's content, wherever it stands."""
        if isinstance(self.item, DataError):
            text = f"! {self.item.what}"
        else:
            text = json.dumps(self.item.value, sort_keys=True, default=repr)
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()

    def fields(self) -> Mapping[str, Any]:
        """All that the row has.

        Raises:
            DataError: the row cannot be read, with file:line.
        """
        if isinstance(self.item, DataError):
            raise self.item
        return self.item.value

    def prompt(self) -> PromptRow:
        """What it asks.

        Raises:
            DataError: the row cannot be read, or asks nothing; with file:line.
        """
        if isinstance(self.item, DataError):
            raise self.item
        return _prompt(self.item)


def read_rows(path: str) -> Iterator[InputRow]:
    """The rows of a file, one at a time: a .txt file has a prompt on each line, the rest is what training reads.

    Raises:
        DataError: the file is missing or is none that can be read. What is wrong with a row, the row says.
    """
    text = Path(path).suffix.lower() == ".txt" and Path(path).is_file()
    return map(InputRow, _lines(path) if text else read_items(path))


def read_prompts(source: str, split: str | None) -> Iterator[InputRow]:
    """As ``read_rows``, also of a folder's split or a dataset by name.

    Raises:
        DataError: the source is missing or is none that can be read.
    """
    return read_rows(source) if split is None else map(InputRow, read_items(source, split))


def _lines(path: str) -> Iterator[Record | DataError]:
    with Path(path).open("rb") as lines:  # bytes: U+2028 and its like are text, not ends of lines
        for number, line in enumerate(lines, start=1):
            where = f"{path}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                what = f"the line is not UTF-8 (byte {error.start}: 0x{line[error.start]:02x})"
                yield DataError(what, where=where, fix="save the file as UTF-8")
                continue
            if text.strip():
                yield Record({"prompt": text.rstrip("\r\n")}, where)


def _prompt(record: Record) -> PromptRow:
    value = fields.without_nulls(record.value)
    sampling = _sampling(record, value.get("sampling", {}))
    for name in ("prompt", "text"):
        if name in value and (name == "prompt" or not _CONVERSATIONS & value.keys()):
            return PromptRow(fields.text(record, name, value[name]), record.where, sampling=sampling)
    conversation = to_conversation(Record(_with_answer(value), record.where))
    messages = list(conversation.messages)
    reference = None
    if messages[-1]["role"] == "assistant":
        last = messages.pop()
        reference = None if last["content"] == _NO_ANSWER else last["content"]
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise DataError("the row asks nothing", where=record.where, fix="end it with a user's message")
    return PromptRow(messages, record.where, conversation.tools, conversation.context, reference, sampling)


def _sampling(record: Record, value: Any) -> dict[str, Any]:
    if isinstance(value, str):  # a cell of a csv file
        value = fields.from_json(record, "sampling", value) if value else {}
    expected = 'an object such as {"temperature": 0.7}'
    return fields.without_nulls(fields.mapping(record, "sampling", value, expected))


# With one of these a text beside it is something else.
_CONVERSATIONS = {"messages", "conversations", "src", "instruction"}
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
