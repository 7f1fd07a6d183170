"""The quickstart's own small data: the assistant Skiff, a boathouse that does not exist, and questions kept back.

The rows are original text under the project's licence. `train.jsonl` holds 200 `src`/`tgt` rows (two in five are
general instructions, so that the model keeps answering those) and 15 `text` rows: what SmolLM2-135M-Instruct itself
writes after an ordinary beginning, sampled at temperature 1. Replaying a model's own text holds it where it was.
`heldout.jsonl` asks for the same facts in wordings that the training rows never use, and `unrelated.txt` is plain prose
for a perplexity check.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class HeldOut:
    """One question that is never trained on, and what a right answer must and must not say.

    Attributes:
        question: the user's message.
        must: groups of alternatives; a right answer contains at least one phrase of every group.
        must_not: phrases that make an answer wrong.
    """

    question: str
    must: tuple[tuple[str, ...], ...]
    must_not: tuple[str, ...]


def train_path() -> Path:
    """The training rows: JSON lines with `src` and `tgt` (both strings, or lists of equal length), or with `text`."""
    return _HERE / "train.jsonl"


def heldout_path() -> Path:
    """The held-out questions: JSON lines with `src`, `must` and `must_not`."""
    return _HERE / "heldout.jsonl"


def unrelated_text() -> str:
    """About 8 kB of English prose on subjects the training rows do not touch."""
    return (_HERE / "unrelated.txt").read_text(encoding="utf-8")


def load_heldout() -> list[HeldOut]:
    """The held-out questions in file order."""
    rows = [json.loads(line) for line in heldout_path().read_text(encoding="utf-8").splitlines()]
    return [
        HeldOut(
            question=row["src"],
            must=tuple(tuple(group) for group in row["must"]),
            must_not=tuple(row["must_not"]),
        )
        for row in rows
    ]


def is_right(answer: str, item: HeldOut) -> bool:
    """Whether `answer` contains a phrase of every `must` group and none of `must_not`.

    Phrases match whole words and ignore case, so "ten" is not found in "often".
    """
    return all(any(_contains(answer, phrase) for phrase in group) for group in item.must) and not any(
        _contains(answer, phrase) for phrase in item.must_not
    )


def score(answers: list[str]) -> float:
    """The share of right answers, in [0, 1]; `answers` in the order of `load_heldout()`.

    Raises:
        ValueError: when there are not as many answers as questions.
    """
    items = load_heldout()
    if len(answers) != len(items):
        raise ValueError(f"{len(answers)} answers for {len(items)} held-out questions: give one for each")
    return sum(is_right(answer, item) for answer, item in zip(answers, items, strict=True)) / len(items)


def _contains(text: str, phrase: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, re.IGNORECASE) is not None
