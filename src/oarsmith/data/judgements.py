"""What the formats of preference data have in common: prompts, answers, labels and margins of a row, checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from oarsmith.data import fields
from oarsmith.data.conversations import Conversation, check_variables
from oarsmith.data.judged import Answer, Judged
from oarsmith.data.records import Record
from oarsmith.data.spans import Message
from oarsmith.data.tool_calls import read_tools
from oarsmith.errors import DataError

_WORDS = {"+": 1.0, "-": 0.0, "true": 1.0, "false": 0.0, "1": 1.0, "0": 0.0}


def prompt_of(
    record: Record,
    messages: Sequence[Message],
    context: Any = None,
    *,
    name: str = "context",
    document: str | None = None,
) -> Conversation:
    """The messages, with the row's tools and the template variables of its field `name`; `document`: the same as text
    for models without a chat template.

    Raises:
        DataError: there is nothing that could be answered.
    """
    if not messages or messages[-1]["role"] == "assistant":
        what = "the prompt ends with an assistant message" if messages else "there is no prompt before the answers"
        raise DataError(what, where=record.where, fix="end the prompt with the question")
    tools = read_tools(record, record.value.get("tools"))
    variables = {} if context is None else context
    check_variables(record, name, variables)
    # Text cannot offer tools.
    text = None if tools else document
    return Conversation(tuple(messages), tuple(tools) or None, variables, text, record.where)


def question(record: Record, text: str) -> Conversation:
    """A prompt that is one text."""
    messages = [{"role": "user", "content": text}]
    variables = record.value.get("chat_template_kwargs")
    return prompt_of(record, messages, variables, name="chat_template_kwargs", document=text)


def reply(record: Record, name: str, value: Any, text: str | None = None) -> Answer:
    """An answer that is one text; `text`: as it stands behind the prompt's document, where that is known."""
    said = filled(record, name, value)
    return Answer(({"role": "assistant", "content": said},), text)


def replies(record: Record, name: str, messages: Sequence[Message]) -> Answer:
    """An answer that is one message or several: the assistant speaks first and last.

    Raises:
        DataError: it does not, or says nothing, or has loss weights.
    """
    if not messages or any(messages[at]["role"] != "assistant" for at in (0, -1)):
        found = " and ".join(dict.fromkeys(messages[at]["role"] for at in (0, -1))) if messages else "nothing"
        what = f"after the prompt, '{name}' has {found} where the assistant should speak first and last"
        raise DataError(
            what, where=record.where, fix="the answers must be to the same question, and end with the answer"
        )
    if not (messages[-1]["content"].strip() or messages[-1].get("tool_calls")):
        raise DataError(f"the answer in '{name}' is empty", where=record.where, fix="remove the row")
    if any(message.get("weight", 1.0) != 1.0 for message in messages):
        what = f"'{name}' gives a message a loss weight, and a judged answer counts as a whole"
        raise DataError(what, where=record.where, fix="remove the weights")
    return Answer(tuple(messages))


def labelled(record: Record, prompt: Conversation, answers: Sequence[Answer]) -> Judged:
    """A pair, the better answer first, or one answer with the row's `label` (LLaMA-Factory: `kto_tag`)."""
    if len(answers) == 2:
        better, worse = answers
        pair = (replace(better, label=1.0), replace(worse, label=0.0))
        given = record.value.get("margin")
        return Judged(prompt, pair, 0.0 if given is None else number(record, "margin", given))
    name = "label" if "label" in record.value else "kto_tag"
    return Judged(prompt, (replace(answers[0], label=good(record, name, record.value.get(name))),))


def filled(record: Record, name: str, value: Any) -> str:
    """A text that says something."""
    text = fields.text(record, name, value)
    if not text.strip():
        raise DataError(f"field '{name}' is empty", where=record.where, fix="remove the row, or fill it")
    return text


def several(record: Record, name: str, expected: str) -> list[Any]:
    """A list with something in it, or JSON text of one (a table's cell)."""
    value = record.value.get(name)
    return fields.items(
        record, name, fields.from_json(record, name, value) if isinstance(value, str) else value, expected
    )


def number(record: Record, name: str, value: Any) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise fields.bad_field(record, name, value, "a number")
    return float(value)


def good(record: Record, name: str, value: Any) -> float:
    """1 or 0: true or false."""
    found = share(record, name, value)
    if found not in (0.0, 1.0):
        raise fields.bad_field(record, name, value, "true or false (1 or 0)")
    return found


def share(record: Record, name: str, value: Any) -> float:
    """How good something is, from 0 to 1; also true and false, "+" and "-"."""
    if isinstance(value, str) and value.strip().lower() in _WORDS:
        return _WORDS[value.strip().lower()]
    found = float(value) if isinstance(value, bool) else value
    if not isinstance(found, int | float) or not 0 <= found <= 1:
        raise fields.bad_field(record, name, value, "a number from 0 to 1, or true or false")
    return float(found)
