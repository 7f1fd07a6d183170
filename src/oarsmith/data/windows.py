"""Making a conversation fit: the newest turns are kept, and what is cut is counted.

Rules (PaddleNLP's, with the losses made smaller): whole turns go from the oldest side first; a turn too long by
itself loses its later steps (after a tool call), then the beginning of its question, at last the end of its answer. A
cut answer has no end-of-turn token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from oarsmith.data.spans import Message, RefusedError, Span, SpanEncoder

PROMPT_TOO_LONG = "system message, tools and template alone exceed the prompt's limit"

TURNS_DROPPED = "oldest turns dropped"
STEPS_DROPPED = "later steps of a turn dropped"
QUESTION_CUT = "question cut at its beginning"
ANSWER_CUT = "answer cut at its end"

# Above this many characters a token of the limit a conversation cannot fit: then the search goes from the newest turn
# on.
_MAX_CHARS_PER_TOKEN = 16


@dataclass(slots=True)
class Fitted:
    """Samples within the limit, the turns refused, and how often what was cut."""

    spans: list[Span] = field(default_factory=list)
    refused: list[RefusedError] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of a conversation and the loss weights of its trained assistant messages."""

    messages: tuple[Message, ...]
    trained: dict[int, float]

    def until(self, index: int) -> Window:
        """The window that ends with message `index`."""
        return Window(self.messages[: index + 1], {at: w for at, w in self.trained.items() if at <= index})

    def only(self, indices: Sequence[int]) -> Window:
        """The window with only these messages trained."""
        return Window(self.messages, {at: self.trained[at] for at in indices})

    def turns(self) -> tuple[int, list[int]]:
        """Number of leading system messages, and the indices at which turns (from one question to the next) begin."""
        num_head = next(
            (n for n, message in enumerate(self.messages) if message["role"] != "system"), len(self.messages)
        )
        starts = [
            n
            for n in range(num_head, len(self.messages))
            if n == num_head or (self.messages[n]["role"] == "user" and self.messages[n - 1]["role"] != "user")
        ]
        return num_head, starts

    def since(self, num_head: int, start: int) -> Window:
        """The system messages and everything from message `start` on."""
        shift = start - num_head
        trained = {at - shift: weight for at, weight in self.trained.items() if at >= start}
        return Window(self.messages[:num_head] + self.messages[start:], trained)


class Fitter:
    """Encodes windows into samples of at most `max_length` tokens.

    Args:
        max_length: tokens a sample may have.
        src_length: tokens the prompt of a turn keeps where prompt and answer together are too long.
    """

    def __init__(self, encoder: SpanEncoder, *, max_length: int, src_length: int) -> None:
        assert 0 < src_length < max_length, (src_length, max_length)
        self.encoder = encoder
        self.max_length = max_length
        self.src_length = src_length

    def fit(self, window: Window, tools: Sequence[Any] | None) -> Fitted:
        """The samples of a conversation."""
        fitted = Fitted()
        num_chars = sum(len(message["content"]) for message in window.messages)
        if num_chars > _MAX_CHARS_PER_TOKEN * self.max_length and len(window.turns()[1]) > 1:
            self._shrink(window, tools, fitted)
        else:
            self._encode(window, tools, fitted)
        return fitted

    def _encode(self, window: Window, tools: Sequence[Any] | None, fitted: Fitted) -> None:
        encoded = self.encoder.encode_turns(window.messages, tools, window.trained)
        fitted.refused += encoded.refused
        for span in encoded.spans:
            if len(span.ids) <= self.max_length:
                fitted.spans.append(span)
            else:
                self._shrink(window.only(span.trained).until(span.trained[-1]), tools, fitted)

    def _shrink(self, window: Window, tools: Sequence[Any] | None, fitted: Fitted) -> None:
        """Fits a window whose last trained message is its last: fewer old turns, or the newest turn cut."""
        window = window.until(max(window.trained))
        num_head, starts = window.turns()
        try:
            first = self._first_that_fits(window, tools, num_head, starts)
            if first is not None and first > 0:
                fitted.notes[TURNS_DROPPED] += first
                self._encode(window.since(num_head, starts[first]), tools, fitted)
                return
            if len(starts) > 1:
                fitted.notes[TURNS_DROPPED] += len(starts) - 1
            fitted.spans.append(self._cut(window.since(num_head, starts[-1]), tools, fitted))
        except RefusedError as refused:
            fitted.refused.append(refused)

    def _first_that_fits(
        self, window: Window, tools: Sequence[Any] | None, num_head: int, starts: list[int]
    ) -> int | None:
        """The earliest turn from which the window fits, None where not even the newest does alone."""

        def fits(turn: int) -> bool:
            return self._length(window.since(num_head, starts[turn]).messages, tools) <= self.max_length

        return first_that_fits(len(starts) - 1, fits)

    def _turn(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> tuple[list[int], list[int]]:
        """Prompt ids and answer ids (with the end of the turn) of the last message."""
        prompt_ids, answer_ids, _ = self.encoder.turn(messages, tools)
        return prompt_ids, answer_ids

    def _length(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> int:
        return sum(map(len, self._turn(messages, tools)))

    def _cut(self, window: Window, tools: Sequence[Any] | None, fitted: Fitted) -> Span:
        """One turn that is too long: as many of its steps as fit, else its first one cut."""
        steps = sorted(window.trained)
        for number in range(len(steps) - 2, -1, -1):
            shorter = window.until(steps[number])
            encoded = self.encoder.encode_turns(shorter.messages, tools, shorter.trained)
            if encoded.spans and len(encoded.spans[-1].ids) <= self.max_length:
                fitted.notes[STEPS_DROPPED] += len(steps) - 1 - number
                fitted.spans += encoded.spans[:-1]
                return encoded.spans[-1]
        if len(steps) > 1:
            fitted.notes[STEPS_DROPPED] += len(steps) - 1
        messages = list(window.messages[: steps[0] + 1])
        prompt_ids, answer_ids = self._turn(messages, tools)
        budget = max(self.src_length, self.max_length - len(answer_ids))
        if len(prompt_ids) > budget:
            fitted.notes[QUESTION_CUT] += 1
            prompt_ids, answer_ids = self._turn(with_question_cut(self.encoder, messages, tools, budget), tools)
        if len(prompt_ids) + len(answer_ids) > self.max_length:
            fitted.notes[ANSWER_CUT] += 1
            answer_ids = answer_ids[: self.max_length - len(prompt_ids)]
        weights = [0.0] * len(prompt_ids) + [window.trained[steps[0]]] * len(answer_ids)
        return Span(prompt_ids + answer_ids, weights, [steps[0]])


def first_that_fits(newest: int, fits: Callable[[int], bool]) -> int | None:
    """The earliest turn from which a conversation `fits`, None where not even the `newest` does alone.

    Goes back from the newest turn in doubling steps and then halves, so the work is in proportion to what is kept.
    """
    if not fits(newest):
        return None
    good, step = newest, 1
    while good > 0 and fits(max(newest - step, 0)):
        good, step = max(newest - step, 0), 2 * step
    bad = max(newest - step, 0) if good > 0 else -1
    while good - bad > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def with_question_cut(
    encoder: SpanEncoder, messages: Sequence[Message], tools: Sequence[Any] | None, budget: int
) -> list[Message]:
    """The messages with the last one before the answer shortened from its beginning until the prompt has at most
    `budget` tokens.

    What stands nearest to the answer is kept; the template around it stays whole.

    Raises:
        RefusedError: the template and what else is in the prompt have more tokens than that.
    """
    asked = messages[-2] if len(messages) > 1 else {"role": "", "content": ""}
    ids = encoder.tokenizer.encode(asked["content"], add_special_tokens=False)
    keep = len(ids)
    while True:
        shortened = [*messages[:-2], asked, messages[-1]]
        prompt_ids, _, _ = encoder.turn(shortened, tools)
        if len(prompt_ids) <= budget:
            return shortened
        others = len(prompt_ids) - keep
        keep -= len(prompt_ids) - budget
        if keep <= 0 or asked["role"] not in ("user", "tool"):
            raise RefusedError(PROMPT_TOO_LONG, f"{others} tokens, limit {budget}")
        # Cutting within a character leaves replacement marks in front.
        asked = {**asked, "content": encoder.tokenizer.decode(ids[-keep:]).lstrip("\ufffd")}
