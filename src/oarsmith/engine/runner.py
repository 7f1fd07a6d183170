"""Computes the scheduler's steps: one token stream a step, prompts and single tokens side by side, no padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING

from oarsmith.engine.backend import Backend, Part
from oarsmith.engine.beams import Beams
from oarsmith.engine.choice import Draft
from oarsmith.engine.logits import Logits
from oarsmith.engine.request import Request
from oarsmith.engine.scheduler import Scheduler
from oarsmith.engine.step import Chunk, Step
from oarsmith.errors import ModelError, OarsmithError

if TYPE_CHECKING:
    from oarsmith.engine.speculation import Drafter

# Rows of logits at a time where those of a whole prompt are looked at: 50 MB of them at V = 49,152.
PROMPT_ROWS = 256


class Runner:
    """What computes, and the scheduler that says what.

    Args:
        drafter: who guesses tokens.

    Attributes:
        num_drafted, num_accepted: tokens that were guessed, and those of them that were right.
    """

    def __init__(self, backend: Backend, scheduler: Scheduler, drafter: Drafter | None = None) -> None:
        self.scheduler = scheduler
        self.num_drafted = self.num_accepted = 0
        self._backend = backend
        self._drafter = drafter
        self._backends = (backend, *(drafter.backends if drafter is not None else ()))
        self._late: list[Request] = []

    def step(self) -> list[Request]:
        """Compute one step; the requests that got a token by it, or an error.

        Those that are done have left the scheduler. What interrupts a step costs time only: it is computed again.
        """
        late, self._late = self._late, []
        step = self.scheduler.schedule()
        if not step.chunks:
            return late
        complete = False
        try:
            self._compute(step)
            self.scheduler.done(step)
            self._part(step)
            advanced = self._choose(step)
            complete = True
        finally:
            if not complete:
                self._late = late
                self._recover()
        return [*late, *advanced]

    def _recover(self) -> None:
        """After an interruption: who is done leaves and is told of in the next step, the others begin again."""
        for request in list(self.scheduler.running):
            if request.table is None:
                continue  # it left with others of its search
            # Siblings part once there is a token of the first; those that have none yet read the prompt themselves.
            siblings, request.siblings = (request.siblings, []) if request.num_generated else ([], request.siblings)
            self._late += [member for member in (request, *siblings) if member.done]
            for sibling in siblings:
                if not sibling.done:
                    self.scheduler.add(sibling)
            if request.done:
                self.scheduler.remove(request)
            else:
                self.scheduler.preempt(request)

    def _compute(self, step: Step) -> None:
        for backend in self._backends:
            for source, target in step.copies:
                backend.copy_page(source, target)
        if self._drafter is not None:
            self._drafter.draft(step)
        # Those with the same adapter side by side.
        step.chunks.sort(key=lambda chunk: chunk.request.adapter or "")
        parts = []
        for chunk in step.chunks:
            request = chunk.request
            assert request.row is not None and request.table is not None, request.id
            tokens = [*request.tokens[chunk.start : chunk.stop], *(draft.token for draft in chunk.drafts)]
            pages, size, adapter = request.table.pages, request.prompt_size, request.adapter
            parts.append(Part(tokens, chunk.start, request.row, pages, size, adapter, request.num_given))
        self._backend.compute(parts)

    def _choose(self, step: Step) -> list[Request]:
        """Let every sequence whose last token was computed take the next one, and more where guesses were right."""
        sizes = [chunk.stop - chunk.start + len(chunk.drafts) for chunk in step.chunks]
        ends = list(accumulate(sizes))
        for chunk, size, end in zip(step.chunks, sizes, ends, strict=True):
            if chunk.request.wants_all_logits:
                self._look_back(chunk, end - size - chunk.start)
        answers: list[_Answer] = []
        searches: dict[Beams, dict[Request, int]] = {}
        places: list[int] = []
        for chunk, end in zip(step.chunks, ends, strict=True):
            if not chunk.complete:
                continue
            if chunk.request.beams is not None:
                searches.setdefault(chunk.request.beams, {})[chunk.request] = len(places)
            else:
                answers.append(_Answer(chunk, len(places)))
            places += range(end - 1 - len(chunk.drafts), end)
        if not places:
            return []
        logits = self._backend.logits(places)
        for beams, rows in searches.items():
            self._search(beams, logits, [rows[seat] for seat in beams.active])
        going, depth = answers, 0
        while going:
            self._take(going, logits, depth)
            going = [answer for answer in going if answer.goes_on(depth)]
            depth += 1
        for answer in answers:
            self._settle(answer)
        over = [beams.seats[0] for beams in searches if beams.over]
        return [*over, *(request for answer in answers for request in answer.group)]

    def _search(self, beams: Beams, logits: Logits, rows: Sequence[int]) -> None:
        """Let a search go on: who gave up leaves, and others take up from the pages of those that they go on from."""
        first = beams.seats[0]
        try:
            top = first.state.sampling.logprobs or 0
            found = logits.continuations(rows, beams.states, beams.scores, beams.num_candidates, top)
            if found is None:
                raise _bad_logits(first)
            left, moves = beams.take(found)
        except OarsmithError as error:
            first.error, beams.over = error, True
        if beams.over:
            self.scheduler.remove(first, failed=first.error is not None)
            return
        for seat in left:
            self.scheduler.vacate(seat)
        for source, seat in moves:
            self._fork(source, seat)
        beams.sit()

    def _part(self, step: Step) -> None:
        """Let those of a search go on by themselves where the first has read for all."""
        for chunk in step.chunks:
            beams = chunk.request.beams
            if beams is not None and beams.num_shared == chunk.stop:
                beams.num_shared = None
                for seat in beams.active[1:]:
                    self._fork(chunk.request, seat)

    def _fork(self, source: Request, other: Request) -> None:
        """Let ``other`` go on from where ``source`` is, or wait for a place in the cache."""
        if self.scheduler.fork(source, other):
            assert source.row is not None and other.row is not None, source.id
            for backend in self._backends:
                backend.copy_sequence(source.row, other.row)

    def _take(self, answers: Sequence[_Answer], logits: Logits, depth: int) -> None:
        """One token for each, from the logits after ``depth`` guesses that were right; an error where those are bad."""
        asked = [(answer, request) for answer in answers for request in answer.group]
        rows, guesses = [answer.row + depth for answer, _ in asked], [answer.guess(depth) for answer, _ in asked]
        choices = logits.choose(rows, [request.state for _, request in asked], guesses)
        for (answer, request), choice in zip(asked, choices, strict=True):
            if choice is None:
                answer.failed = True
                request.error = _bad_logits(request)
            else:
                request.accept(choice)

    def _settle(self, answer: _Answer) -> None:
        """Note which guesses were right, let siblings go on by themselves, and those that are done leave."""
        leader, *siblings = answer.group
        leader.siblings = []
        if leader.pace is not None and leader.num_generated > 1:
            guessed, right = len(answer.chunk.drafts), answer.num_right
            leader.pace.learn(guessed, right)
            self.num_drafted += guessed
            self.num_accepted += right
            self.scheduler.took(leader, right)
        for sibling in siblings:
            if not sibling.done:
                self._fork(leader, sibling)
        if leader.done:
            self.scheduler.remove(leader, failed=answer.failed)

    def _look_back(self, chunk: Chunk, offset: int) -> None:
        """What the model thought of the prompt's tokens: the place in the step of the sequence's token i is i plus
        ``offset``, and speaks of token i + 1."""
        request = chunk.request
        assert request.prompt_logprobs is not None, request.id
        # Read again after its pages were lost: what is known stays.
        before = request.num_virtual
        start, stop = before + len(request.prompt_choices), min(chunk.stop, request.num_given - 1)
        for first in range(max(start, chunk.start), stop, PROMPT_ROWS):
            end = min(first + PROMPT_ROWS, stop)
            logits = self._backend.logits(range(first + offset, end + offset))
            request.prompt_choices += logits.prompt_choices(
                request.prompt[first - before + 1 : end - before + 1], request.prompt_logprobs
            )


@dataclass(eq=False)
class _Answer:
    """A piece after which tokens are taken.

    Attributes:
        row: of the logits after its last token; those after its guesses follow.
        group: the request, and the siblings of a prompt that was just read, who choose from the same logits.
        num_right: guesses that were right.
        failed: the logits were not numbers.
    """

    chunk: Chunk
    row: int
    group: list[Request] = field(init=False)
    num_right: int = 0
    failed: bool = False

    def __post_init__(self) -> None:
        self.group = [self.chunk.request, *self.chunk.request.siblings]

    def guess(self, depth: int) -> Draft | None:
        """The guess at the token after ``depth`` others."""
        return self.chunk.drafts[depth] if depth < len(self.chunk.drafts) else None

    def goes_on(self, depth: int) -> bool:
        """Whether the token that was just taken was guessed, so that the logits after it are there; counts it."""
        guess, request = self.guess(depth), self.chunk.request
        if guess is None or self.failed or request.error is not None or request.tokens[-1] != guess.token:
            return False
        self.num_right += 1
        return not request.done


def _bad_logits(request: Request) -> ModelError:
    return ModelError(
        "the model's logits are not finite (NaN or infinite)",
        where=request.id,
        fix="load it with dtype fp32; if that does not help, the weights are damaged",
    )
