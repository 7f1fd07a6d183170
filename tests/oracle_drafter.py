"""Somebody who knows the answers."""

from __future__ import annotations

from collections.abc import Sequence

from oarsmith.engine import Completion
from oarsmith.engine.choice import Draft
from oarsmith.engine.step import Step


class OracleDrafter:
    """Guesses what was answered before, with a mistake now and then."""

    backends = ()

    def __init__(self, answers: Sequence[Completion], vocab_size: int, every: int = 4) -> None:
        self._answers = [[*answer.prompt_ids, *answer.ids] for answer in answers]
        self._size, self._every = vocab_size, every

    def draft(self, step: Step) -> None:
        for chunk in step.chunks:
            known = chunk.request.tokens
            text = next(text for text in self._answers if text[: len(known)] == known)
            for place in range(len(known), min(len(known) + chunk.room, len(text))):
                chunk.drafts.append(Draft(text[place] if place % self._every else (text[place] + 1) % self._size))
