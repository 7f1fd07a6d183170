"""Which tokens of which requests are computed next, and who has the pages for them.

No tensors: a step is a list of pieces of token sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

from oarsmith.engine.line import Line
from oarsmith.engine.pages import PagePool, PageTable
from oarsmith.engine.request import Request
from oarsmith.engine.step import Chunk, Step
from oarsmith.errors import DataError
from oarsmith.models.caching import CacheRules


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
        line: requests that wait.
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
        self._max_running = max_running
        self._rows = list(range(max_running))[::-1]
        self.line = Line()

    def check(self, request: Request) -> None:
        """Whether a request can be served at all.

        Raises:
            DataError: it would not fit into an empty cache.
        """
        count, pool = len(request.seats), self.pool
        if count > (rows := self._max_running):
            what = f"a search of {count} beams needs as many rows; the cache has {rows}"
            raise DataError(what, where=request.id, fix="lower num_beams or raise batch_size")
        if (needed := count * self._most_pages(request)) > pool.num_pages:
            what = f"prompt and answer of up to {request.room} tokens need {needed} pages of {pool.block_size} tokens"
            what = f"{count} times {what}" if count > 1 else what
            fix = "shorten the prompt, lower max_new_tokens, or give the engine more pages (num_pages, cache_bytes)"
            raise DataError(f"{what}; the cache has {pool.num_pages}", where=request.id, fix=fix)

    def _most_pages(self, request: Request) -> int:
        """The most pages that it will hold at a time."""
        return self.pool.most_pages(request.room, self._rules.window, self._max_step_tokens)

    def add(self, request: Request) -> None:
        """Let a request wait for its turn."""
        self.check(request)
        self.line.join(request)

    def remove(self, request: Request, *, failed: bool = False) -> None:
        """Forget a request (with its search) that is finished or given up; its pages and rows are free at once."""
        first = request.seats[0]
        if first.waiting:
            self.line.leave(first)
        else:
            self._leave(request, forget=failed)

    def _leave(self, request: Request, *, forget: bool = False) -> None:
        for seat in request.seats:
            if seat.table is not None:
                self.vacate(seat, forget=forget)
        if request.beams is not None:
            self._rows += request.beams.rows
            request.beams.rows.clear()

    def vacate(self, request: Request, *, forget: bool = False) -> None:
        """Take a running request's pages and row; a row of a search is kept for its other seats."""
        assert request.table is not None and request.row is not None, request.id
        self.pool.close(request.table, forget=forget)
        self._rows_for(request).append(request.row)
        self.running.remove(request)
        request.table = request.row = None
        request.num_computed = request.num_followed = 0

    def _rows_for(self, request: Request) -> list[int]:
        return self._rows if request.beams is None else request.beams.rows

    def preempt(self, request: Request) -> None:
        """Take the pages and the row of a running request (of its search), and let it wait for its turn again."""
        self._leave(request)
        self.num_preempted += 1
        self.line.join(request if request.beams is None else request.beams.gather())

    def forget(self) -> None:
        """Let everybody begin again, with nothing in the cache that is known."""
        while self.running:
            self.preempt(self.running[-1])
        self.pool.forget()

    def schedule(self) -> Step:
        """What to compute next; empty where nothing waits or runs."""
        step = Step()
        self._make_way()
        for request in self.running:
            self._restart(request)
        self.running.sort(key=Request.order)
        lost = self.num_preempted
        # First those that need one token: an answer never waits for a prompt, but for the others of a search.
        answering = [r for r in self.running if r.num_left == 1 and (r.beams is None or r.beams.level)]
        reading = [request for request in self.running if request.num_left > 1]
        for request in answering:
            if request.table is not None:
                self._continue(request, step)
        # Who has just lost its pages is not to take those of the next one.
        for request in reading:
            if self.num_preempted == lost:
                self._admit(step, above=request.priority)
            if request.table is not None:
                self._continue(request, step)
        if self.num_preempted == lost:
            self._admit(step)
        return step

    def _make_way(self) -> None:
        """Let the first that waits have the place of running ones of lower priority, where it has none otherwise."""
        while (first := self.line.first) is not None:
            lower = [request for request in self.running if request.priority < first.priority]
            if not lower or self._fits(first, []) or not self._fits(first, lower):
                return
            self.preempt(max(lower, key=Request.order))

    def _fits(self, request: Request, gone: list[Request]) -> bool:
        """Whether there are rows and pages for a request that waits, if these were not there any more."""
        beams = {other.beams for other in gone if other.beams is not None}
        if len(request.seats) > len(self._rows) + len(gone) + sum(len(each.rows) for each in beams):
            return False
        table = self._open(request)
        full = self._needed(request, table) > self._spare(gone)
        self._close(request, table)
        return not full or len(gone) == len(self.running)

    def _spare(self, gone: Sequence[Request] = ()) -> int:
        """Pages that can be had, if these were not there any more, but for one for each of the others that grows: else
        somebody would soon have to leave again."""
        growing = sum(other.table.grows for other in self.running if other.table is not None and other not in gone)
        freed = self.pool.num_freed([other.table for other in gone if other.table is not None])
        return self.pool.num_free + freed - growing

    def _restart(self, request: Request) -> None:
        """Void what was cached of a request that outgrew its rotation."""
        limit = self._rules.reread_after
        if limit is not None and request.prompt_size <= limit < len(request.tokens):
            request.num_computed, request.num_followed, request.prompt_size = 0, 0, len(request.tokens)
            assert request.table is not None, request.id
            if request.table.num_gone:
                self.pool.close(request.table)

    def _continue(self, request: Request, step: Step) -> None:
        count = self._share(request, step)
        if count == 0:
            return
        table, start, room = request.table, request.num_computed, self._room(request)
        assert table is not None, request.id
        while (copies := self.pool.grow(table, start, start + count + room)) is None:
            self.preempt(max(self.running, key=Request.order))
            step.drop_preempted()
            if request.table is None:
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

    def _admit(self, step: Step, above: int | None = None) -> None:
        """Start those that wait, in their order; ``above``: those with a higher priority only."""
        while (request := self.line.first) is not None and (above is None or request.priority > above):
            if not self._start(request, step):
                return

    def _open(self, request: Request) -> PageTable:
        """A table for a request that waits, with what is known of its beginning."""
        # The last token is always computed: the next one follows from it.
        end = request.num_shared or len(request.tokens)
        known = request.tokens[: end - 1] if self._prefixes and not request.wants_all_logits else []
        table = self.pool.open(request.room, known, request.salt, self._rules.window)
        request.num_computed = len(table.pages) * self.pool.block_size
        request.prompt_size = len(request.tokens) if self._rules.reread_after is not None else request.num_given
        return table

    def _close(self, request: Request, table: PageTable) -> None:
        """It has to wait after all."""
        self.pool.close(table)
        request.num_computed = 0

    def _needed(self, request: Request, table: PageTable) -> int:
        """Pages for a whole prompt; of what a window lets go of, for the part that it holds at a time."""
        whole = self.pool.pages_for(len(request.tokens) + self._room(request))
        needed = min(whole, self._most_pages(request)) - (len(table.pages) - table.num_gone)
        if request.beams is not None:
            end = request.num_shared or len(request.tokens)
            needed += (len(request.beams.active) - 1) * (whole - end // self.pool.block_size)
        return needed

    def _start(self, request: Request, step: Step) -> bool:
        """Give a request its pages and its part of the step; False: it must wait."""
        if step.num_tokens >= self._max_step_tokens or len(request.seats) > len(self._rows):
            return False
        table = self._open(request)
        count, room = self._share(request, step), self._room(request)
        full = bool(self.running) and self._needed(request, table) > self._spare()
        if count == 0 or full or self._soon_known(request, step):
            self._close(request, table)
            return False
        end = len(request.tokens) if self._rules.window is None else request.num_computed + count
        copies = self.pool.grow(table, request.num_computed, end + room)
        assert copies == [], (copies, request.id)
        if request.beams is not None:
            request.beams.rows += [self._rows.pop() for _ in request.seats]
        self.line.leave(request)
        request.table, request.row = table, self._rows_for(request).pop()
        request.num_followed = request.num_computed
        self.num_found += request.num_computed
        self.running.append(request)
        step.chunks.append(Chunk(request, request.num_computed, request.num_computed + count, room))
        return True

    def _soon_known(self, request: Request, step: Step) -> bool:
        """Whether the step computes the next page of what the request begins with, for somebody else."""
        end = request.num_computed + self.pool.block_size
        if not self._prefixes or request.wants_all_logits or end >= (request.num_shared or len(request.tokens)):
            return False
        return step.brings(request, end)

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
            self.pool.remember(request.table, request.tokens[:known], request.salt)
        if self._rules.window is not None:
            self.pool.trim(request.table, known, self._rules.window)

    def fork(self, source: Request, other: Request) -> bool:
        """Let ``other``, whose prompt is that of ``source``, go on from the same pages; False: it must wait instead."""
        rows = self._rows_for(other)
        if not rows or source.table is None:
            self.line.join(other)
            return False
        other.table, other.row = self.pool.fork(source.table), rows.pop()
        other.num_computed, other.num_followed = source.num_computed, source.num_followed
        other.prompt_size = source.prompt_size
        self.running.append(other)
        return True
