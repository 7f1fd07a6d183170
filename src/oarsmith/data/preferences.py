"""Preference data in the formats that it comes in, each read into a prompt with judged answers.

A format is recognised by the fields of the row. What is no judgement is refused with the row: equal scores, empty
answers, answers to different questions.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import nan
from typing import Any

from oarsmith.data import fields, formats
from oarsmith.data.conversations import Conversation, to_conversation
from oarsmith.data.judged import Answer, Judged
from oarsmith.data.judgements import filled, good, labelled, number, prompt_of, question, replies, reply, several, share
from oarsmith.data.records import Record
from oarsmith.data.spans import Message
from oarsmith.errors import DataError

_HH_TURN = re.compile(r"(?:\A|\n\n)\s*(Human|Assistant):")
_HH_ANSWER = "\n\nAssistant:"


def is_preference(value: Mapping[str, Any]) -> bool:
    """Whether a row's fields are those of preference data."""
    return _reader_of(fields.without_nulls(value)) is not None


def read_judged(record: Record) -> Judged:
    """One row.

    Raises:
        DataError: no known format, a field of the wrong shape, or no judgement; with file:line and the field.
    """
    row = Record(fields.without_nulls(record.value), record.where)
    reader = _reader_of(row.value)
    if reader is None:
        found = ", ".join(map(str, list(row.value)[:8])) or "none"
        raise DataError(
            f"the row's fields ({found}) fit no known format of preference data",
            where=record.where,
            fix="use src/response/sort, prompt/chosen/rejected, prompt/completion/label, or conversations with chosen "
            "and rejected; conversations alone are for oarsmith sft",
        )
    return reader(row)


def read_answered(record: Record) -> Judged:
    """One row as `read_judged` reads it, or an answer that nobody judged, whose label is nan: a conversation that ends
    with it, in any format of those for `sft`, or TRL's `prompt` and `completion`.

    Raises:
        DataError: as `read_judged`, or there is no answer.
    """
    if is_preference(record.value):
        return read_judged(record)
    row = Record(fields.without_nulls(record.value), record.where)
    if "prompt" in row.value and "completion" in row.value:
        found = read_judged(Record({**row.value, "label": True}, record.where))
    else:
        told = to_conversation(row)
        if told.document is not None:
            raise DataError("a score is of an answer, and the row is a text", where=record.where, fix="give a dialogue")
        asked, said = told.messages[:-1], told.messages[-1:]
        answer = replies(row, "messages", said)
        found = Judged(replace(prompt_of(row, asked, told.context), tools=told.tools), (answer,))
    return replace(found, answers=(replace(found.answers[0], label=nan),))


def _reader_of(value: Mapping[str, Any]) -> Callable[[Record], Judged] | None:
    for wanted, reader in _READERS:
        if all(name in value for name in wanted):
            return reader
    return None


def _scored(record: Record) -> Judged:
    """PaddleNLP: `src`, `tgt` (earlier answers), `response` with one or two answers, `sort` with their scores (the
    higher is preferred; of one answer 1 good, 0 bad), optional `context` with `system` and template variables."""
    responses = several(record, "response", "a list of one or two answers")
    scores = [
        number(record, f"sort[{n}]", score) for n, score in enumerate(several(record, "sort", "a list of scores"))
    ]
    if len(responses) > 2 or len(scores) != len(responses):
        what = f"'response' has {len(responses)} answers and 'sort' {len(scores)} scores, expected one or two of each"
        raise DataError(what, where=record.where, fix="give a score for each of at most two answers")
    prompt = _src_and_tgt(record)
    answers = [reply(record, f"response[{n}]", response) for n, response in enumerate(responses)]
    if len(scores) == 1:
        return labelled(Record({"label": good(record, "sort[0]", scores[0])}, record.where), prompt, answers)
    if scores[0] == scores[1]:
        what = f"both answers have the score {scores[0]:g} in 'sort', so neither is preferred"
        raise DataError(what, where=record.where, fix="remove the row, or give the better answer the higher score")
    return labelled(record, prompt, answers if scores[0] > scores[1] else answers[::-1])


def _src_and_tgt(record: Record) -> Conversation:
    """The conversation of `src`, `tgt` and `context` up to the last question."""
    asked, answered = (_turns_of(record.value.get(name)) for name in ("src", "tgt"))
    if len(asked) != len(answered) + 1:
        what = f"'src' has {len(asked)} turns and 'tgt' {len(answered)} answers, expected one answer fewer"
        raise DataError(what, where=record.where, fix="'tgt' has the answers to all questions but the last")
    whole = {**record.value, "src": asked, "tgt": [*answered, ""]}
    messages, _, context = formats.src_tgt(Record(whole, record.where))
    filled(record, "src", messages[-2]["content"])
    return prompt_of(record, messages[:-1], context)


def _turns_of(value: Any) -> list[Any]:
    if value is None or value == "":
        return []
    return value if isinstance(value, list) else [value]


def _numbered(record: Record) -> Judged:
    """safe-rlhf and PaddleNLP's older reward models: `prompt`, `response_0`, `response_1`, `better_response_id`."""
    better = number(record, "better_response_id", record.value["better_response_id"])
    if better not in (0, 1):
        raise fields.bad_field(record, "better_response_id", record.value["better_response_id"], "0 or 1")
    return _texts(record, [f"response_{int(at)}" for at in (better, 1 - better)])


def _steps_of_src(record: Record) -> Judged:
    """PaddleNLP's process rewards: `src`, `tgt`, `responses` (the steps of one answer) and `labels`."""
    return Judged(_src_and_tgt(record), (_steps(record, "responses"),))


def _steps_of_prompt(record: Record) -> Judged:
    """TRL's stepwise supervision: `prompt`, `completions` (the steps of one answer) and `labels`."""
    return Judged(question(record, filled(record, "prompt", record.value["prompt"])), (_steps(record, "completions"),))


def _steps(record: Record, column: str) -> Answer:
    steps, labels = several(record, column, "a list of steps"), several(record, "labels", "a list with a label a step")
    if len(steps) != len(labels):
        what = f"'{column}' has {len(steps)} steps and 'labels' {len(labels)} labels"
        raise DataError(what, where=record.where, fix="give each step its label")
    texts = [filled(record, f"{column}[{n}]", step) for n, step in enumerate(steps)]
    judged = [share(record, f"labels[{n}]", label) for n, label in enumerate(labels)]
    return Answer(steps=tuple(zip(texts, judged, strict=True)))


def _completions(record: Record) -> Judged:
    """TRL: `chosen` and `rejected`, or `completion` and `label`, each text or messages; `prompt`, text or messages, or
    what the two begin with; optional `tools`, `chat_template_kwargs` and `margin`."""
    row = record.value
    names = ["chosen", "rejected"] if "chosen" in row else ["completion"]
    prompt = row.get("prompt")
    if all(isinstance(row[name], str) for name in names):
        if isinstance(prompt, str):
            return _texts(record, names)
        if prompt is None and len(names) == 2:
            are_dialogues = all(_HH_TURN.match(row[name]) for name in names)
            return _dialogues(record) if are_dialogues else _texts_with_same_beginning(record)
    begins = [] if prompt is None else _as_messages(record, "prompt", "user")
    wholes, is_told_twice = [], False
    for name in names:
        turns = _as_messages(record, name, "assistant")
        # The prompt may stand once more before the answer (UltraFeedback).
        twice = turns[: len(begins)] == begins or (isinstance(prompt, str) and not _speaks(turns[0]))
        is_told_twice |= twice
        whole = {**row, name: turns if twice else [*begins, *turns]}
        wholes.append(formats.openai_messages(Record(whole, record.where), name)[0])
    if prompt is not None and not (is_told_twice and isinstance(prompt, str)):
        num_prompt = len(begins)
    else:
        num_prompt = _num_common(*wholes) if len(wholes) == 2 else len(wholes[0]) - 1
    return _answered(record, names, wholes, num_prompt)


def _as_messages(record: Record, name: str, role: str) -> list[Any]:
    """A text, a message or a list of messages as a list."""
    value = record.value[name]
    if isinstance(value, str):
        return [{"role": role, "content": filled(record, name, value)}]
    return [value] if isinstance(value, dict) else fields.items(record, name, value, "text or a list of messages")


def _speaks(turn: Any) -> bool:
    return isinstance(turn, dict) and turn.get("role") == "assistant"


def _num_common(first: list[Message], second: list[Message]) -> int:
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))))


def _answered(record: Record, names: list[str], wholes: list[list[Message]], num_prompt: int) -> Judged:
    """Whole conversations whose first `num_prompt` messages are the prompt."""
    variables = record.value.get("chat_template_kwargs")
    prompt = prompt_of(record, wholes[0][:num_prompt], variables, name="chat_template_kwargs")
    answers = [replies(record, name, whole[num_prompt:]) for name, whole in zip(names, wholes, strict=True)]
    if any(whole[:num_prompt] != wholes[0][:num_prompt] for whole in wholes):
        raise _other_questions(record)
    return labelled(record, prompt, answers)


def _sharegpt(record: Record) -> Judged:
    """LLaMA-Factory: `conversations` of from/value up to the question, `chosen` and `rejected` as the turn (or turns)
    after it; optional `system` and `tools`."""
    row = record.value
    num_prompt = len(formats.sharegpt(record)[0])
    wholes = []
    for name in ("chosen", "rejected"):
        given = fields.from_json(record, name, row[name]) if isinstance(row[name], str) else row[name]
        whole = [*row["conversations"], *(given if isinstance(given, list) else [given])]
        wholes.append(formats.sharegpt(Record({**row, "conversations": whole}, record.where))[0])
    return _answered(record, ["chosen", "rejected"], wholes, num_prompt)


def _judged_messages(record: Record) -> Judged:
    """LLaMA-Factory's pointwise rows: `messages` or `conversations` that end with the answer, `label` or `kto_tag`."""
    has_messages = "messages" in record.value
    messages = (formats.openai_messages if has_messages else formats.sharegpt)(record)[0]
    return _answered(record, ["messages" if has_messages else "conversations"], [messages], len(messages) - 1)


def _dialogues(record: Record) -> Judged:
    r"""Anthropic's HH: `chosen` and `rejected` are dialogues (`\n\nHuman: ...\n\nAssistant: ...`) that differ in the
    last answer."""
    prompts, answers = [], []
    for name in ("chosen", "rejected"):
        text = fields.text(record, name, record.value[name])
        at = text.rfind(_HH_ANSWER)
        if at < 0 or text.rfind("\n\nHuman:") > at:
            what = f"the dialogue in '{name}' does not end with an answer of the assistant"
            raise DataError(what, where=record.where, fix=r"end it with '\n\nAssistant: ...'")
        said = text[at + len(_HH_ANSWER) :]
        prompts.append(text[: at + len(_HH_ANSWER)])
        answers.append(reply(record, name, said.strip(), said))
    if prompts[0] != prompts[1]:
        raise _other_questions(record)
    parts = _HH_TURN.split(prompts[0])  # "", who, text, who, text, ..., "Assistant", ""
    turns = zip(parts[1:-2:2], parts[2:-2:2], strict=True)
    messages = [{"role": "user" if who == "Human" else "assistant", "content": text.strip()} for who, text in turns]
    return labelled(record, prompt_of(record, messages, document=prompts[0]), answers)


def _texts(record: Record, names: list[str]) -> Judged:
    """A question and its answers as texts."""
    prompt = question(record, filled(record, "prompt", record.value["prompt"]))
    return labelled(record, prompt, [reply(record, name, record.value[name], record.value[name]) for name in names])


def _texts_with_same_beginning(record: Record) -> Judged:
    """Two texts and no prompt: that is what they begin with, in whole words (TRL's `extract_prompt`)."""
    texts = [filled(record, name, record.value[name]) for name in ("chosen", "rejected")]
    num_same = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*texts, strict=False))))
    while num_same > 0 and not all(text[num_same : num_same + 1].isspace() for text in texts):
        num_same -= 1
    prompt = texts[0][:num_same]
    if not prompt.strip():
        what = "'chosen' and 'rejected' do not begin with the same words, and the row has no 'prompt'"
        raise DataError(what, where=record.where, fix="give what they answer as 'prompt'")
    names = ("chosen", "rejected")
    answers = [Answer((), filled(record, name, text[num_same:])) for name, text in zip(names, texts, strict=True)]
    return labelled(record, Conversation((), document=prompt, where=record.where), answers)


def _other_questions(record: Record) -> DataError:
    what = "'chosen' and 'rejected' differ before the last answer, so they do not answer the same prompt"
    return DataError(what, where=record.where, fix="remove the row")


# By the fields that are not null, in the order of the check.
_READERS: tuple[tuple[tuple[str, ...], Callable[[Record], Judged]], ...] = (
    (("response", "sort"), _scored),
    (("src", "responses", "labels"), _steps_of_src),
    (("prompt", "completions", "labels"), _steps_of_prompt),
    (("prompt", "response_0", "response_1", "better_response_id"), _numbered),
    (("conversations", "chosen", "rejected"), _sharegpt),
    (("chosen", "rejected"), _completions),
    (("prompt", "completion", "label"), _completions),
    (("messages", "kto_tag"), _judged_messages),
    (("conversations", "kto_tag"), _judged_messages),
    (("messages", "label"), _judged_messages),
    (("conversations", "label"), _judged_messages),
)
