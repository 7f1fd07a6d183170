"""An engine on a thread of its own, and answers for an asyncio loop."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from oarsmith.engine import Engine, Sampling
from oarsmith.engine.request import Completion
from oarsmith.engine.ticket import Output
from oarsmith.errors import OarsmithError
from oarsmith.serve.callers import current_call

T = TypeVar("T")
Ending = Literal["stop", "length", "error", "aborted"]
_log = logging.getLogger(__name__)


class BusyError(OarsmithError):
    """As many requests wait as may."""


class ClosedError(OarsmithError):
    """The service is ending, or its engine has died."""


@dataclass(frozen=True)
class Load:
    """What an engine has to do: requests it works on and those that wait, and pages of its cache.

    Attributes:
        preempted: requests, since the start, that had to make way for others and were computed again.
        found_tokens: of prompts, since the start, that were in the cache already.
    """

    running: int = 0
    waiting: int = 0
    free_pages: int = 0
    num_pages: int = 0
    preempted: int = 0
    found_tokens: int = 0


class Answer:
    """A request that the worker took. Iterate over its outputs; the last one has the completion or the error.

    An answer that nobody wants any more has to be closed: then it leaves the engine and its pages are free.

    Attributes:
        began, first, last: when it was asked for, and when its first and its newest token came, by ``time.monotonic``.
        num_tokens: that came, of all answers to the prompt.
    """

    def __init__(self, worker: Worker, id: str, prompt: list[int], adapter: str | None) -> None:
        self.id = id
        self.prompt = prompt
        self.adapter = adapter
        self.began = time.monotonic()
        self.first: float | None = None
        self.last = self.began
        self.num_tokens = 0
        self.call = current_call.get()
        self._worker = worker
        self._outputs = asyncio.Queue[Output]()
        self._done = False

    def tell(self, output: Output) -> None:
        """Something new; on the loop's thread."""
        if output.choice is not None:
            self.num_tokens += 1
            self.last = time.monotonic()
            if self.first is None:
                self.first = self.last
        elif output.completion is not None:
            # Of best_of and beams nothing is told before the end.
            kept = (output.completion, *output.completion.others)
            self.num_tokens = max(self.num_tokens, sum(one.num_tokens for one in kept))
        self._outputs.put_nowait(output)

    async def __aiter__(self) -> AsyncIterator[Output]:
        while not self._done:
            output = await self._outputs.get()
            self._done = output.completion is not None or output.error is not None
            yield output

    async def completion(self) -> Completion:
        """The whole answer.

        Raises:
            OarsmithError: there is none.
        """
        async for output in self:
            if output.error is not None:
                raise output.error
            if output.completion is not None:
                return output.completion
        raise AssertionError(self.id)

    def close(self) -> None:
        """Give it up, if it is not finished. May be called again."""
        self._done = True
        self._worker.forget(self)


class Worker:
    """Runs an engine. Everything but the engine's steps happens on the loop's thread.

    Args:
        max_waiting: requests that may wait beside those that the engine works on.
    """

    def __init__(self, engine: Engine, *, max_waiting: int) -> None:
        self.engine = engine
        self.load = Load()
        self.max_waiting = max_waiting
        self._most = engine.batch_size + max_waiting
        # Told of every answer that ends, and of the engine's death; on the loop's thread.
        self.on_end: Callable[[Answer, Ending], None] = lambda answer, ending: None
        self.on_death: Callable[[], None] = lambda: None
        self._commands = queue.SimpleQueue[Callable[[], None]]()
        self._open: dict[str, Answer] = {}
        self._calls: set[asyncio.Future[Any]] = set()
        self._closing = self._dead = self._ended = False
        self._num_orders = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin; from within the loop that will ask."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the engine can still answer."""
        return self._thread.is_alive() and not self._dead

    @property
    def accepting(self) -> bool:
        """Whether requests are taken as far as there is room."""
        return self.alive and not self._closing

    @property
    def ready(self) -> bool:
        """Whether a new request would be taken."""
        return self.accepting and len(self._open) < self._most

    @property
    def num_open(self) -> int:
        """Requests that are not finished."""
        return len(self._open)

    def submit(
        self, ids: list[int], sampling: Sampling, *, adapter: str | None = None, priority: int = 0, copies: int = 1
    ) -> Answer:
        """Let a checked prompt (``Engine.encode``) wait for its turn.

        Args:
            copies: how many of the places in the queue it takes.

        Raises:
            BusyError: too many wait already.
            ClosedError: the service is ending.
            LimitError: the caller has too many open.
        """
        if not self.accepting:
            raise ClosedError("the service is ending", fix="ask another one")
        if len(self._open) + copies > self._most:
            raise BusyError(f"{len(self._open)} requests are open, as many as may be", fix="try again in a moment")
        self._num_orders += 1
        answer = Answer(self, f"order {self._num_orders}", ids, adapter)
        if answer.call is not None and answer.call.caller is not None:
            answer.call.caller.open()
        self._open[answer.id] = answer

        def add() -> None:
            try:
                self.engine.add(ids, sampling, id=answer.id, adapter=adapter, priority=priority)
            except OarsmithError as error:
                self._tell([Output(answer.id, 0, None, error=error)])
            except (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, AttributeError):
                # A fault of ours; it must not end the service for all others.
                _log.exception("a request could not be taken")
                self._tell([Output(answer.id, 0, None, error=OarsmithError("the request cannot be taken"))])

        self._commands.put(add)
        return answer

    async def call(self, function: Callable[[Engine], T]) -> T:
        """What a function gives that needs the engine between two of its steps.

        Raises:
            ClosedError: the service is ending.
        """
        if self._loop is None or not self.alive:
            raise ClosedError("the service is ending", fix="ask another one")
        found, loop = self._loop.create_future(), self._loop

        def settle(set_to: Callable[[Any], None], value: Any) -> None:
            if not found.done():
                set_to(value)

        def run() -> None:
            try:
                value = function(self.engine)
            except (OarsmithError, KeyError, ValueError) as error:
                loop.call_soon_threadsafe(settle, found.set_exception, error)
            else:
                loop.call_soon_threadsafe(settle, found.set_result, value)

        self._calls.add(found)
        self._commands.put(run)
        try:
            return await found
        finally:
            self._calls.discard(found)

    def forget(self, answer: Answer) -> None:
        """Give up an answer; called by it."""
        if answer.id in self._open:
            self._commands.put(lambda: void(self.engine.abort(answer.id)))
            self._leave(answer, "aborted")

    def drain(self) -> None:
        """Take nothing new from now on."""
        self._closing = True

    async def close(self, seconds: float) -> bool:
        """Take nothing new, let what is open finish for as long, then give it up; whether all was answered."""
        self.drain()
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        while self._open and self.alive and loop.time() < until:
            await asyncio.sleep(0.02)
        unanswered = list(self._open.values())
        self._fail("the service ended before the answer did")
        self._commands.put(self._stop)
        await asyncio.to_thread(self._thread.join, 10.0)
        return not unanswered

    def _run(self) -> None:
        try:
            self._tell([])  # the cache is made before the first prompt comes
            while True:
                self._obey(wait=not self.engine.busy)
                if self.engine.busy:
                    self._tell(self.engine.step())
        except _StopError:
            self._ended = True
        finally:
            self._call(self._died)

    def _obey(self, wait: bool) -> None:
        while True:
            try:
                command = self._commands.get(block=wait)
            except queue.Empty:
                return
            wait = False
            command()

    @staticmethod
    def _stop() -> None:
        raise _StopError

    def _tell(self, outputs: list[Output]) -> None:
        """From the engine's thread to the loop's, once a step."""
        scheduler = self.engine.runner.scheduler
        pool = scheduler.pool
        load = Load(
            len(scheduler.running),
            len(scheduler.line),
            pool.num_free,
            pool.num_pages,
            scheduler.num_preempted,
            scheduler.num_found,
        )
        self._call(self._deliver, outputs, load)

    def _deliver(self, outputs: list[Output], load: Load) -> None:
        self.load = load
        of = defaultdict[str, list[Output]](list)
        for output in outputs:
            of[output.id].append(output)
        for id, own in of.items():
            answer = self._open.get(id)
            if answer is None:
                continue
            for output in own:
                answer.tell(output)
            end = own[-1]
            if end.error is not None:
                self._leave(answer, "error")
            elif end.completion is not None:
                self._leave(answer, end.completion.finish_reason, end.completion.text)

    def _leave(self, answer: Answer, ending: Ending, text: str = "") -> None:
        del self._open[answer.id]
        call, num_prompt_tokens = answer.call, len(answer.prompt)
        if call is not None:
            call.num_prompt_tokens += num_prompt_tokens
            call.num_tokens += answer.num_tokens
            if call.keep_text:
                call.prompts.append(answer.prompt)
                call.answers.append(text)
            if call.caller is not None:
                call.caller.close(num_prompt_tokens + answer.num_tokens)
        self.on_end(answer, ending)

    def _died(self) -> None:
        """The engine's thread has ended; nothing that waits for it may wait any longer."""
        self._dead = True
        self._fail("the engine has stopped")
        for found in self._calls:
            if not found.done():
                found.set_exception(ClosedError("the engine has stopped", fix="ask another one"))
        if not self._ended:
            self.on_death()

    def _fail(self, why: str) -> None:
        for id, answer in list(self._open.items()):
            self._leave(answer, "error")
            self._commands.put(lambda id=id: void(self.engine.abort(id)))  # type: ignore[misc]
            answer.tell(Output(id, 0, None, error=ClosedError(why, fix="ask again")))

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)


class _StopError(Exception):
    """Ends the engine's thread."""


def void(_: object) -> None:
    """Drops a result."""
