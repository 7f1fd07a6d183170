"""Prompts with answers that somebody judged, as text: pairs, single answers, and answers judged step by step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import nan
from typing import Literal

from oarsmith.data.conversations import Conversation
from oarsmith.data.spans import Message
from oarsmith.errors import DataError

Kind = Literal["pair", "point", "steps"]


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer.

    Attributes:
        messages: what follows the prompt's messages; an assistant's is the first and the last.
        text: what follows the prompt's text, where the prompt has one.
        label: 1 good, 0 bad, nan nothing is said.
        steps: of an answer judged step by step, each step's text and how good it is, from 0 to 1; then it has neither
            messages nor text.
    """

    messages: tuple[Message, ...] = ()
    text: str | None = None
    label: float = nan
    steps: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Judged:
    """A prompt and answers to it, the better one first.

    Attributes:
        prompt: its messages, and in ``document`` the same as plain text where it can be told so. Without messages it is
            plain text in any case.
        margin: how much better the first answer is, where the row says so; else 0.
    """

    prompt: Conversation
    answers: tuple[Answer, ...]
    margin: float = 0.0

    @property
    def where(self) -> str:
        """file:line of the row."""
        return self.prompt.where

    @property
    def kind(self) -> Kind:
        """A pair, one answer, or one answer judged step by step."""
        if self.answers[0].steps:
            return "steps"
        return "pair" if len(self.answers) == 2 else "point"


def pointwise(row: Judged) -> list[Judged]:
    """A pair as two rows of one answer, the good one first (TRL's `unpair_preference_dataset`)."""
    return [replace(row, answers=(answer,), margin=0.0) for answer in row.answers]


def with_mismatched(rows: Sequence[Judged]) -> list[Judged]:
    """Each row of one answer with a second one, unlabelled, that was given to another prompt.

    KTO's KL term is estimated on such pairs (Ethayarajh et al. 2024, section 4.1). Row i gets the answer of row -i, as
    in PaddleNLP; where that is a row of the same prompt, of the next one whose prompt is another.

    Raises:
        DataError: all rows have the same prompt.
    """
    prompts = [_key(row) for row in rows]
    if len(set(prompts)) < 2:
        raise DataError(
            "the KL term of KTO needs the answers of other prompts, and all rows have the same one",
            where=rows[0].where if rows else None,
            fix="give rows of at least two prompts",
        )
    num = len(rows)
    next_other = [0] * num  # of each row the next one, row 0 after the last, whose prompt is another
    for place in reversed(range(2 * num)):  # twice around: the last row's is known only after the first row's
        at, after = place % num, (place + 1) % num
        next_other[at] = after if prompts[after] != prompts[at] else next_other[after]
    paired = []
    for at, row in enumerate(rows):
        other = -at % num
        if prompts[other] == prompts[at]:
            other = next_other[other]
        assert len(row.answers) == 1 and prompts[other] != prompts[at], (row.where, rows[other].where)
        paired.append(replace(row, answers=(*row.answers, replace(rows[other].answers[0], label=nan))))
    return paired


def _key(row: Judged) -> str:
    """Equal for equal prompts."""
    return json.dumps([row.prompt.messages, row.prompt.document], sort_keys=True, default=str)
