"""What the choice of a request's next token depends on, besides the logits. No PyTorch here."""

from __future__ import annotations

import copy
from array import array
from collections.abc import Collection, Sequence
from typing import Protocol

from oarsmith.engine.draws import Draws
from oarsmith.engine.sampling import Sampling
from oarsmith.errors import ConfigError, OarsmithError


class Constraint(Protocol):
    """What an answer must be: which tokens may come next, given those before."""

    def allowed(self) -> bytearray:
        """For each token a byte: 0 where it may not come next; at least one may.

        Raises:
            OarsmithError: the constraint became too complex to follow.
        """

    def accept(self, token: int) -> None:
        """The token was taken."""

    def fork(self) -> Constraint:
        """Another one that goes on from here."""


class Occurrences:
    """Distinct tokens with the number of times each occurs in the answer; those of the prompt alone have 0.

    Attributes:
        ids: int64.
        counts: float32, one for each id.
    """

    def __init__(self, tokens: Collection[int]) -> None:
        self._place = {token: place for place, token in enumerate(tokens)}
        self.ids = array("q", self._place)
        self.counts = array("f", bytes(4 * len(self._place)))

    def fork(self) -> Occurrences:
        """Another one that goes on from here."""
        other = copy.copy(self)
        other._place, other.ids, other.counts = dict(self._place), self.ids[:], self.counts[:]
        return other

    def add(self, token: int) -> None:
        place = self._place.setdefault(token, len(self._place))
        if place == len(self.ids):
            self.ids.append(token)
            self.counts.append(0)
        self.counts[place] += 1


class SamplingState:
    """State of one request's sampling. It is on the CPU and outlives the request's place in a cache.

    Args:
        prompt: its token ids.
        draws: where its random numbers come from; one a token, none when greedy.
        vocab_size: columns of the logits.
        grammar: what the answer must be.
        stop_ids: tokens that end the answer; min_new_tokens keeps them out.
        bad_words: token sequences that the answer does not get.

    Attributes:
        failure: why the constraint cannot be followed any more; ``accept`` raises it.

    Raises:
        ConfigError: logit_bias or bad_words has a token outside the vocabulary.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int],
        draws: Draws,
        *,
        vocab_size: int,
        grammar: Constraint | None = None,
        stop_ids: Collection[int] = (),
        bad_words: Sequence[Sequence[int]] = (),
    ) -> None:
        self.sampling = sampling
        self.grammar = grammar
        self.failure: OarsmithError | None = None
        self.occurrences: Occurrences | None = None
        if sampling.repetition_penalty != 1:
            self.occurrences = Occurrences(dict.fromkeys(prompt))
        elif sampling.presence_penalty or sampling.frequency_penalty:
            self.occurrences = Occurrences(())
        self.bias_ids = array("q", sampling.logit_bias)
        self.bias = array("f", sampling.logit_bias.values())
        self.answer: list[int] = []
        self._draws = draws
        self._stop_ids = [index for index in stop_ids if 0 <= index < vocab_size]
        self._bad_words = [tuple(word) for word in bad_words]
        for name, tokens in (("logit_bias", sampling.logit_bias), ("bad_words", [t for w in bad_words for t in w])):
            high = max(tokens, default=0)
            if high >= vocab_size:
                what = f"{name} has token {high}; the vocabulary has {vocab_size}"
                raise ConfigError(what, where=name, fix=f"token ids must be below {vocab_size}")

    @property
    def edits(self) -> bool:
        """Whether logits may have to be changed before a token is chosen."""
        return bool(
            self.grammar is not None
            or self.occurrences is not None
            or len(self.bias_ids)
            or self._bad_words
            or self.sampling.min_new_tokens
        )

    @property
    def banned(self) -> list[int]:
        """Tokens that may not come next, whatever the constraint."""
        banned = self._stop_ids if len(self.answer) < self.sampling.min_new_tokens else []
        return [*banned, *(word[-1] for word in self._bad_words if self._follows(word[:-1]))]

    def _follows(self, beginning: tuple[int, ...]) -> bool:
        return not beginning or tuple(self.answer[-len(beginning) :]) == beginning

    def allowed(self) -> bytearray | None:
        """For each token 0 where the constraint does not allow it; None: everything."""
        if self.grammar is None or self.failure is not None:
            return None
        try:
            return self.grammar.allowed()
        except OarsmithError as error:
            self.failure = error
            return None

    def accept(self, token: int) -> None:
        """The token was taken: the next choice comes after it.

        Raises:
            OarsmithError: the constraint could not be followed, so the token means nothing.
        """
        if self.failure is not None:
            raise self.failure
        self.answer.append(token)
        if self.occurrences is not None:
            self.occurrences.add(token)
        if self.grammar is not None:
            self.grammar.accept(token)

    def fork(self) -> SamplingState:
        """Another one that goes on from here, with random numbers of its own: they follow from the place."""
        other = copy.copy(self)
        other.answer = list(self.answer)
        other.occurrences = None if self.occurrences is None else self.occurrences.fork()
        other.grammar = None if self.grammar is None else self.grammar.fork()
        other._draws = Draws(f"fork {self._draws.name} {len(self.answer)}")
        return other

    def uniform(self) -> float:
        """The next random number in [0, 1)."""
        return self._draws.next()
