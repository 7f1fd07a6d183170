"""Beam search: the sequences that are likeliest as a whole, kept side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from oarsmith.engine.choice import Choice, Continuation
from oarsmith.engine.reader import TextReader
from oarsmith.engine.state import SamplingState

if TYPE_CHECKING:
    from oarsmith.engine.request import FinishReason, Request


@dataclass(frozen=True)
class Hypothesis:
    """An answer on its way, or one that is over.

    Attributes:
        tokens: prompt and answer.
        score: log-probability of the answer; of one that is over divided by its length to the power of the penalty.
        parent: which hypothesis of the step before it goes on from.
    """

    tokens: list[int]
    choices: list[Choice]
    state: SamplingState
    reader: TextReader | None
    score: float = 0.0
    parent: int = 0
    finish_reason: FinishReason | None = None


@dataclass(eq=False)
class Beams:
    """A beam search as transformers does it: the same candidates, the same rules for its end.

    Every hypothesis has a seat, a request of its own in the cache; all take their tokens in the same step. What the
    seats hold follows from the hypotheses: where the search loses its pages, the first seat reads what all have in
    common again, and the others go on from there.

    Args:
        seats: one for each beam; the first one reads the prompt.

    Attributes:
        active: the seats of the hypotheses, in their order.
        rows: of the cache, kept for seats that have none at the moment.
        num_shared: the first seat is to read so many tokens, which all have in common; then the others go on from
            there. None: each reads its own.
        finished: hypotheses that are over, the best first.
        over: whether the search is.
    """

    seats: list[Request]
    active: list[Request] = field(init=False)
    rows: list[int] = field(default_factory=list)
    num_shared: int | None = None
    finished: list[Hypothesis] = field(default_factory=list)
    over: bool = False

    def __post_init__(self) -> None:
        first = self.seats[0]
        self._hypotheses = [Hypothesis(first.tokens, [], first.state, first.reader)]
        self._sampling = first.state.sampling
        self._hopeful = True
        self.active = [first]
        for seat in self.seats:
            seat.beams = self

    @property
    def level(self) -> bool:
        """Whether all hypotheses need nothing but their next token."""
        return all(seat.table is not None and seat.num_left == 1 for seat in self.active)

    def gather(self) -> Request:
        """The search lost its pages: it goes on with the first seat, which is to read for all."""
        self.active = self.seats[: len(self._hypotheses)]
        self.sit()
        columns = zip(*(hypothesis.tokens for hypothesis in self._hypotheses), strict=True)
        self.num_shared = next((place for place, column in enumerate(columns) if len(set(column)) > 1), None)
        return self.seats[0]

    def sit(self) -> None:
        """Let the seats hold their hypotheses."""
        for seat, hypothesis in zip(self.active, self._hypotheses, strict=True):
            seat.tokens, seat.state, seat.choices = hypothesis.tokens, hypothesis.state, hypothesis.choices

    @property
    def states(self) -> list[SamplingState]:
        """What the continuation of each hypothesis depends on."""
        return [hypothesis.state for hypothesis in self._hypotheses]

    @property
    def scores(self) -> list[float]:
        """Log-probability of each hypothesis."""
        return [hypothesis.score for hypothesis in self._hypotheses]

    @property
    def num_candidates(self) -> int:
        """So many continuations that enough of them go on, however many end."""
        return max(2, 1 + len(self.seats[0].stop_ids)) * self._sampling.num_beams

    def take(self, candidates: Sequence[Continuation]) -> tuple[list[Request], list[tuple[Request, Request]]]:
        """Go on with the best of the likeliest continuations.

        Returns:
            Seats whose hypotheses were given up, and (source, seat): who is to go on from whose pages. Then they are
            to ``sit``. Nothing, where the search is over.

        Raises:
            OarsmithError: the constraint cannot be followed any further.
        """
        new = self._step(candidates)
        if self.over:
            return [], []
        parents = [self.active[hypothesis.parent] for hypothesis in new]
        left = [seat for seat in self.active if seat not in parents]
        free = [*left, *(seat for seat in self.seats if seat not in self.active)]
        seats: list[Request] = []
        moves = []
        for parent in parents:
            # The first that goes on from a hypothesis keeps its seat.
            if parent in seats:
                moves.append((parent, free[0]))
            seats.append(free.pop(0) if parent in seats else parent)
        # From here on what was there before is of no use to anybody.
        self._hypotheses, self.active = new, seats
        return left, moves

    def _step(self, candidates: Sequence[Continuation]) -> list[Hypothesis]:
        """The hypotheses of the next step; finished ones are noted."""
        sampling = self._sampling
        length = len(self._hypotheses[0].choices) + 1
        going: list[Hypothesis] = []
        ended: list[Hypothesis] = []
        for rank, candidate in enumerate(candidates):
            if rank >= sampling.num_beams and len(going) == sampling.num_beams:
                break
            found = self._extended(candidate)
            if found.finish_reason is None:
                going.append(found)
            elif rank < sampling.num_beams:
                ended.append(replace(found, score=found.score / length**sampling.length_penalty))
        self._note(ended, going, length)
        return going

    def _extended(self, candidate: Continuation) -> Hypothesis:
        """A hypothesis with one more token; its finish reason says whether it is over."""
        before, first, token = self._hypotheses[candidate.parent], self.seats[0], candidate.choice.token
        reason: FinishReason | None = None
        state = before.state.fork()
        state.accept(token)
        reader = None if before.reader is None else before.reader.fork()
        if token in first.stop_ids:
            reason = "stop"
        elif reader is not None:
            reader.push(token)
            reason = "stop" if reader.stopped else None
        choices = [*before.choices, candidate.choice]
        if reason is None and len(choices) >= first.limit:
            reason = "length"
        if reader is not None and reason is not None:
            reader.finish()
            reason = "stop" if reader.stopped else reason
        tokens = [*before.tokens, token]
        return Hypothesis(tokens, choices, state, reader, candidate.total, candidate.parent, reason)

    def _note(self, ended: Sequence[Hypothesis], going: Sequence[Hypothesis], length: int) -> None:
        """Keep the best of those that are over, and see whether there is anything left to hope for."""
        sampling, first = self._sampling, self.seats[0]
        beams, early = sampling.num_beams, sampling.early_stopping
        if self._hopeful and not (early is True and len(self.finished) == beams):
            both = sorted([*self.finished, *ended], key=lambda hypothesis: hypothesis.score, reverse=True)
            self.finished = both[:beams]
        full = len(self.finished) == beams
        if going:
            longest = first.limit if early == "never" and sampling.length_penalty > 0 else length
            best = going[0].score / longest**sampling.length_penalty
            self._hopeful = self._hopeful and (not full or best > self.finished[-1].score)
        self.over = not going or not self._hopeful or (early is True and full)

    def results(self) -> list[Request]:
        """The finished hypotheses in seats, the best first."""
        for seat, found in zip(self.seats, self.finished, strict=False):
            seat.tokens, seat.choices, seat.reader = found.tokens, found.choices, found.reader
            seat.finish_reason, seat.score = found.finish_reason, found.score
        return self.seats[: len(self.finished)]
