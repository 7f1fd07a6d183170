"""Who sees whom beside causality, as arrays of a step: the rules of models/visibility.py without PyTorch."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from oarsmith.models.prefix import find_prefix
from oarsmith.models.spec import PrefixLM, ResetAfter


class Part(Protocol):
    """Tokens that a step brings of one sequence (engine/backend.py)."""

    @property
    def tokens(self) -> Sequence[int]: ...
    @property
    def start(self) -> int: ...
    @property
    def row(self) -> int: ...
    @property
    def pages(self) -> Sequence[int]: ...
    @property
    def prompt_size(self) -> int: ...


@dataclass
class Look:
    """Of each row of a step: what rotations go by, the second kind of it, the first and the last place it sees.

    Empty where the rows' places say it.
    """

    positions: array[int] = field(default_factory=lambda: array("i"))
    blocks: array[int] = field(default_factory=lambda: array("i"))
    lows: array[int] = field(default_factory=lambda: array("i"))
    highs: array[int] = field(default_factory=lambda: array("i"))


class Visibility:
    """A rule, and what it remembers of each row of the cache."""

    def __init__(self, rule: PrefixLM | ResetAfter | None) -> None:
        self._rule = rule
        self._marks: dict[int, tuple[int, ...]] = {}

    def look(self, parts: Sequence[Part]) -> Look:
        """The arrays of a step with these parts.

        Raises:
            ModelError: a prompt without the tokens that the rule needs.
        """
        look = Look()
        match self._rule:
            case PrefixLM():
                for part in parts:
                    self._prefix(self._rule, part, look)
            case ResetAfter(training_only=False):
                for part in parts:
                    self._reset(self._rule, part, look)
        return look

    def copy(self, source: int, target: int) -> None:
        """Let a row go on from where another is."""
        if source in self._marks:
            self._marks[target] = self._marks[source]

    def _prefix(self, rule: PrefixLM, part: Part, look: Look) -> None:
        if part.start == 0:
            # A prompt that is read again comes with what was generated after it.
            self._marks[part.row] = find_prefix(rule, part.tokens[: part.prompt_size])
        context, frozen = self._marks[part.row]
        for place in range(part.start, part.start + len(part.tokens)):
            look.positions.append(place if place < context else frozen)
            look.blocks.append(max(place - context + 1, 0))
            look.highs.append(max(place, context - 1))

    def _reset(self, rule: ResetAfter, part: Part, look: Look) -> None:
        (begin,) = self._marks.get(part.row, (0,)) if part.start else (0,)
        for place, token in enumerate(part.tokens, start=part.start):
            look.lows.append(begin)
            if token == rule.end_id:
                begin = place + 1
        self._marks[part.row] = (begin,)
