"""Which tokens of which requests are computed next, and who has the pages for them.

No tensors: a step is a list of pieces of token sequences.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from oarsmith.engine.pages import PagePool
from oarsmith.engine.request import Request
from oarsmith.engine.sampler import Draft
from oarsmith.errors import DataError
from oarsmith.models.caching import CacheRules


@dataclass(eq=False)
class Chunk:
    """Tokens [start, stop) of a request; those before ``start`` are in the cache.

    ``room``: how many guesses may follow them; ``drafts``: those that do.
    """

    request: Request
    start: int
    stop: int
    room: int = 0
    drafts: list[Draft] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether the next token follows from it."""
        return self.stop == len(self.request.tokens)


@dataclass
class Step:
    """One call of the model.

    ``copies``: (source, target) of pages to be copied before it, in this order.
    """

    chunks: list[Chunk] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """With room for guesses."""
        return sum(chunk.stop - chunk.start + chunk.room for chunk in self.chunks)


class Scheduler:
    """Requests wait, run, and wait again when others need their pages.

    The order is priority, then arrival; nobody overtakes. Requests that answer get their next token in every step; what
    is left of ``max_step_tokens`` goes to prompts, the first in order first. A request that loses its pages is computed
    again later, from what is still known of it.

    Args:
        max_running: most requests in the cache at the same time, each in a row of its own.
        prefixes: let requests begin with pages that are known to hold the same tokens.
        followed: a model that guesses has keys in the same pages; what it has not read is not known to be there.

    Attributes:
        running: requests in the cache.
        num_preempted: how often one of them lost its pages.
        num_found: tokens that were in the cache when a request began.
    """

    def __init__(
        self,
        pool: PagePool,
        rules: CacheRules,
        *,
        max_running: int,
        max_step_tokens: int,
        prefixes: bool = True,
        followed: bool = False,
    ) -> None:
        assert max_step_tokens >= max_running >= 1, (max_step_tokens, max_running)
        self.pool = pool
        self.running: list[Request] = []
        self.num_preempted = self.num_found = 0
        self._rules = rules
        self._prefixes = prefixes and rules.prefixes
        self._followed = followed
        self._max_step_tokens = max_step_tokens
        self._rows = list(range(max_running))[::-1]
        self._waiting: list[tuple[int, int, Request]] = []
        self._num_waiting = 0

    @property
    def num_waiting(self) -> int:
        return self._num_waiting

    @property
    def busy(self) -> bool:
        """Whether any request is not finished."""
        return bool(self.running or self._num_waiting)

    def check(self, request: Request) -> None:
        """Whether a request can be served at all.

        Raises:
            DataError: it would not fit into an empty cache.
        """
        needed = self.pool.pages_for(request.room)
        if needed > self.pool.num_pages:
            raise DataError(
                f"prompt and answer of up to {request.room} tokens need {needed} pages of {self.pool.block_size} "
                f"tokens; the cache has {self.pool.num_pages}",
                where=request.id,
                fix="shorten the prompt, lower max_new_tokens, or give the engine more pages (num_pages)",
            )

    def add(self, request: Request) -> None:
        """Let a request wait for its turn."""
        self.check(request)
        self._wait(request)

    def _wait(self, request: Request) -> None:
        request.waiting = True
        self._num_waiting += 1
        heapq.heappush(self._waiting, (-request.priority, request.arrival, request))

    def remove(self, request: Request, *, failed: bool = False) -> None:
        """Forget a request that is finished or given up; its pages and its row are free at once."""
        if request.waiting:
            # It stays in the heap until it comes to its front.
            request.waiting = False
            self._num_waiting -= 1
        elif request.table is not None:
            self._leave(request, forget=failed)

    def _leave(self, request: Request, *, forget: bool = False) -> None:
        assert request.table is not None and request.row is not None, request.id
        self.pool.close(request.table, forget=forget)
        self._rows.append(request.row)
        self.running.remove(request)
        request.table = request.row = None
        request.num_computed = request.num_followed = 0

    def preempt(self, request: Request) -> None:
        """Take a running request's pages and row, and let it wait for its turn again."""
        self._leave(request)
        self.num_preempted += 1
        self._wait(request)

    def schedule(self) -> Step:
        """What to compute next; empty where nothing waits or runs."""
        step = Step()
        for request in self.running:
            self._restart(request)
        self.running.sort(key=Request.order)
        running = len(self.running)
        # First those that need one token: an answer never waits for a prompt.
        answering = [request for request in self.running if request.num_left == 1]
        reading = [request for request in self.running if request.num_left > 1]
        for request in (*answering, *reading):
            if request.table is not None:
                self._continue(request, step)
        if len(self.running) == running:
            # Who has just lost its pages is not to take those of the next one.
            self._admit(step)
        return step

    def _restart(self, request: Request) -> None:
        """Void what was cached of a request that outgrew its rotation."""
        limit = self._rules.reread_after
        if limit is not None and request.prompt_size <= limit < len(request.tokens):
            request.num_computed, request.num_followed, request.prompt_size = 0, 0, len(request.tokens)

    def _continue(self, request: Request, step: Step) -> None:
        count = self._share(request, step)
        if count == 0:
            return
        assert request.table is not None
        start, room = request.num_computed, self._room(request)
        while (copies := self.pool.grow(request.table, start, start + count + room)) is None:
            last = max(self.running, key=Request.order)
            step.chunks = [chunk for chunk in step.chunks if chunk.request is not last]
            self.preempt(last)
            if last is request:
                return
        step.copies += copies
        step.chunks.append(Chunk(request, start, start + count, room))

    def _room(self, request: Request) -> int:
        """How many guesses the request's next tokens may have after them."""
        room, limit = request.num_guesses, self._rules.reread_after
        if limit is not None and request.prompt_size <= limit:
            # Behind it lies what turns every key by other frequencies.
            room = min(room, limit - len(request.tokens))
        return room

    def _share(self, request: Request, step: Step) -> int:
        """How many of the request's tokens fit into the step."""
        left, budget = request.num_to_read, self._max_step_tokens - step.num_tokens
        if left > budget and self._rules.whole_prompt:
            # However long it is, it gets a step in which it is the only prompt.
            return 0 if any(chunk.stop - chunk.start > 1 for chunk in step.chunks) else left
        return min(left, budget)

    def _admit(self, step: Step) -> None:
        while self._waiting and self._rows:
            request = self._waiting[0][2]
            if not request.waiting:
                heapq.heappop(self._waiting)
            elif not self._start(request, step):
                return
            else:
                heapq.heappop(self._waiting)

    def _start(self, request: Request, step: Step) -> bool:
        """Give a request its pages and its part of the step; False: it must wait."""
        if step.num_tokens >= self._max_step_tokens:
            return False
        # The last token is always computed: the next one follows from it.
        known = request.tokens[:-1] if self._prefixes and not request.wants_all_logits else []
        table = self.pool.open(request.room, known)
        request.num_computed = len(table.pages) * self.pool.block_size
        if self._soon_known(request, known, step):
            self.pool.close(table)
            request.num_computed = 0
            return False
        request.prompt_size = len(request.tokens if self._rules.reread_after is not None else request.prompt)
        count = self._share(request, step)
        # Pages for the whole prompt, and one for each of those that grow: else somebody would soon have to leave again.
        spare = self.pool.num_free - sum(other.table.grows for other in self.running if other.table is not None)
        needed = self.pool.pages_for(len(request.tokens) + self._room(request)) - len(table.pages)
        if count == 0 or (self.running and needed > spare):
            self.pool.close(table)
            request.num_computed = 0
            return False
        room = self._room(request)
        copies = self.pool.grow(table, request.num_computed, len(request.tokens) + room)
        assert copies == [], (copies, request.id)
        request.table, request.row, request.waiting = table, self._rows.pop(), False
        request.num_followed = request.num_computed
        self._num_waiting -= 1
        self.num_found += request.num_computed
        self.running.append(request)
        step.chunks.append(Chunk(request, request.num_computed, request.num_computed + count, room))
        return True

    def _soon_known(self, request: Request, known: list[int], step: Step) -> bool:
        """Whether the step computes the next page of what the request begins with, for somebody else."""
        end = request.num_computed + self.pool.block_size
        return end <= len(known) and any(
            chunk.start < end <= chunk.stop and chunk.request.tokens[:end] == known[:end] for chunk in step.chunks
        )

    def done(self, step: Step) -> None:
        """The step was computed: its keys and values are in the cache."""
        for chunk in step.chunks:
            request = chunk.request
            assert request.table is not None, request.id
            request.num_computed = chunk.stop
            self._remember(request)

    def took(self, request: Request, count: int) -> None:
        """So many of the step's guesses were right: their keys and values are in the cache too."""
        request.num_computed += count
        self._remember(request)

    def _remember(self, request: Request) -> None:
        known = min(request.num_computed, request.num_followed) if self._followed else request.num_computed
        assert request.table is not None, request.id
        if self._prefixes and known // self.pool.block_size > len(request.table.keys):
            self.pool.remember(request.table, request.tokens[:known])

    def fork(self, source: Request, other: Request) -> bool:
        """Let ``other``, whose prompt is that of ``source``, go on from the same pages; False: it must wait instead."""
        if not self._rows or source.table is None:
            self._wait(other)
            return False
        other.table, other.row = self.pool.fork(source.table), self._rows.pop()
        other.num_computed, other.num_followed = source.num_computed, source.num_followed
        other.prompt_size = source.prompt_size
        self.running.append(other)
        return True
