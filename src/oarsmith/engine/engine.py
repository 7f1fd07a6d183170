"""The engine: prompts in, answers out. Its inside (cache, batching) may change; this interface stays."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from oarsmith.engine.build import Sizes, Speculation, build_runner, open_draft_model, open_model
from oarsmith.engine.desk import Desk
from oarsmith.engine.intake import Intake, Prompt
from oarsmith.engine.request import Completion
from oarsmith.engine.runner import Runner
from oarsmith.engine.sampling import Sampling
from oarsmith.engine.stream import Stream
from oarsmith.engine.ticket import Output, Ticket
from oarsmith.errors import ConfigError, OarsmithError
from oarsmith.models.decoder import Decoder
from oarsmith.text import Tokenizer

_GREEDY = Sampling()


class Engine:
    """Generates with one model. Calls, streams and added requests that are open at the same time share its steps.

    The tokens drawn for a request follow from its prompt, the sampling's seed and its place in the call; what else is
    in the batch changes only the rounding of the matrix products. The engine keeps what it computed of prompts: where
    the model's weights are changed, call ``forget``.

    Args:
        model: a model directory, an adapter directory, a run folder, or a loaded decoder in eval mode.
        tokenizer: not given: the one that lies with a path. An engine without one takes token ids only.
        dtype: for a path; ``auto`` is what the files hold, but float32 where the device would have to emulate that.
        device: for a path; ``auto`` is the GPU where there is one.
        adapter: for a path: a LoRA adapter to put on top.
        batch_size: most requests that are worked on at the same time; others wait.
        num_pages: pages of the key/value cache; not given: as many as ``batch_size`` requests can fill, but at most
            half of the memory that is free. Where requests need more, the last of them are computed again later.
        block_size: tokens of a page.
        max_step_tokens: most tokens that are computed at once: longer prompts come in pieces, between which others
            go on.
        prefix_caching: prompts that begin alike share pages, also with those answered before. Families whose keys do
            not follow from the tokens before them alone never do.
        speculative: who guesses tokens that the model then checks several at a time: ``ngram``: what followed when the
            text last ended as it does now; or a smaller model with the same vocabulary. Answers are distributed as
            without; greedy ones, and with ``ngram`` all, are the same.
        num_draft_tokens: most tokens that are guessed at a time.
        ngram_min, ngram_max: for ``ngram``: how many tokens at the end must stand alike, and up to how many count.

    Raises:
        OarsmithError: the model or its tokenizer cannot be loaded.
    """

    def __init__(
        self,
        model: str | Path | Decoder,
        tokenizer: Tokenizer | None = None,
        *,
        dtype: str = "auto",
        device: str = "auto",
        adapter: str | Path | None = None,
        batch_size: int = 8,
        num_pages: int | None = None,
        block_size: int = 64,
        max_step_tokens: int = 2048,
        prefix_caching: bool = True,
        speculative: str | Path | Decoder | None = None,
        num_draft_tokens: int = 4,
        ngram_min: int = 1,
        ngram_max: int = 3,
    ) -> None:
        self._speculation = Speculation(
            by=speculative, num_draft_tokens=num_draft_tokens, ngram_min=ngram_min, ngram_max=ngram_max
        )
        self._sizes = Sizes(
            batch_size=batch_size,
            num_pages=num_pages,
            block_size=block_size,
            max_step_tokens=max_step_tokens,
            prefix_caching=prefix_caching,
            tokens_each=1 if speculative is None else 1 + num_draft_tokens,
        )
        self.model, self.tokenizer = open_model(model, tokenizer, dtype, device, adapter)
        self.batch_size = batch_size
        self._draft_model = open_draft_model(self._speculation, self.model, self.tokenizer)
        self._intake = Intake(self.model.spec, self.tokenizer, None if speculative is None else num_draft_tokens)
        self._desk = Desk(self._intake)

    @cached_property
    def runner(self) -> Runner:
        """The cache and what fills it; made when the first prompt comes."""
        return build_runner(self.model, self._sizes, self._speculation, self._draft_model)

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and answer together."""
        return self.model.spec.max_positions

    @property
    def guesses(self) -> tuple[int, int]:
        """Tokens that were guessed so far (``speculative``), and how many of them were right."""
        return self.runner.num_drafted, self.runner.num_accepted

    def generate(self, prompts: Prompt | Sequence[Prompt], sampling: Sampling | None = None) -> list[Completion]:
        """Answers in the order of the prompts.

        Args:
            prompts: one prompt or a list of them.
            sampling: not given: greedy, 256 tokens.

        Raises:
            OarsmithError: a prompt that is empty, longer than the context or outside the vocabulary.
        """
        batch = [cast(Prompt, prompts)] if _is_one(prompts) else list(cast(Sequence[Prompt], prompts))
        found = dict(self.as_completed(batch, sampling))
        return [found[index] for index in range(len(batch))]

    def as_completed(
        self, prompts: Sequence[Prompt], sampling: Sampling | None = None
    ) -> Iterator[tuple[int, Completion]]:
        """(index of the prompt, its answer), each as soon as it is finished. All prompts are checked first."""
        sampling = sampling or _GREEDY
        batch = [self.encode(prompt, where=f"prompt {index}") for index, prompt in enumerate(prompts)]
        seed, finished = _seed(sampling), deque[Ticket]()
        tickets = [
            self._ticket(ids, sampling, seed, index, where=f"prompt {index}", finished=finished.append)
            for index, ids in enumerate(batch)
        ]
        return self._drain(tickets, finished)

    def stream(self, prompt: Prompt, sampling: Sampling | None = None, *, tools: Sequence[Any] | None = None) -> Stream:
        """The answer's text in pieces: whole characters, and never a part of a stop text.

        Raises:
            OarsmithError: as `generate`; or the engine has no tokenizer.
        """
        sampling = sampling or _GREEDY
        if sampling.num_samples > 1:
            what = "a stream is one answer, and known token by token"
            raise ConfigError(what, where="n", fix="leave out n, best_of and num_beams, or use generate")
        ticket = self._ticket(self.encode(prompt, tools=tools), sampling, _seed(sampling), 0, read=True)
        self._open(ticket)
        return Stream(self, ticket)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling: Sampling | None = None,
        *,
        tools: Sequence[Any] | None = None,
    ) -> Completion:
        """The answer to a conversation that ends with a user's (or a tool's) message."""
        return self.generate(self.encode(messages, tools=tools), sampling)[0]

    def encode(
        self, prompt: Prompt, *, tools: Sequence[Any] | None = None, where: str | None = None, **variables: Any
    ) -> list[int]:
        """Ids of a prompt, checked.

        Args:
            tools: JSON schemas of functions, for a conversation.
            where: names the prompt in errors.
            variables: what else the chat template reads.

        Raises:
            OarsmithError: empty, no room for an answer in the context, ids outside the vocabulary, no tokenizer.
        """
        return self._intake.encode(prompt, tools, where, variables)

    def add(
        self,
        prompt: Prompt,
        sampling: Sampling | None = None,
        *,
        priority: int = 0,
        id: str | None = None,
        index: int = 0,
    ) -> str:
        """Let a prompt wait for its turn; ``step`` tells what becomes of it.

        Args:
            priority: those with a higher one come first; among equals, those that came first.
            id: names it; not given: a new name.
            index: its number among those that share a seed: what is drawn for it is what ``generate`` draws for that
                place in a list.

        Returns:
            Its id.

        Raises:
            OarsmithError: as `generate`; or the id is in use.
        """
        sampling = sampling or _GREEDY
        self._desk.check(id)
        ids, read = self.encode(prompt, where=id), self.tokenizer is not None
        ticket = self._ticket(ids, sampling, _seed(sampling), index, where=id, read=read, priority=priority)
        ticket.told = True
        self._open(ticket, id)
        return ticket.id

    def step(self) -> list[Output]:
        """What one step, or those taken for others in the meantime, brought for the prompts that were added."""
        outputs = self._desk.take()
        if not outputs:
            self.advance()
            outputs = self._desk.take()
        return outputs

    def abort(self, id: str) -> bool:
        """Give up a request at once, and free its pages; False: it is not there, or not any more."""
        ticket = self._desk.close(id)
        if ticket is None:
            return False
        for request in ticket.requests:
            if not request.done:
                self.runner.scheduler.remove(request)
        return True

    def is_open(self, id: str) -> bool:
        """Whether a request is not finished."""
        return id in self._desk.tickets

    @property
    def busy(self) -> bool:
        """Whether anything is not finished, or was not told yet."""
        return self._desk.busy

    def forget(self) -> None:
        """Compute everything anew from now on: the model's weights are others."""
        scheduler = self.runner.scheduler
        for request in list(scheduler.running):
            scheduler.preempt(request)
        scheduler.pool.forget()

    def advance(self) -> None:
        """One step for everybody."""
        self._desk.settle(self.runner.step())

    def _open(self, ticket: Ticket, id: str | None = None) -> None:
        self._desk.open(ticket, id)
        self.runner.scheduler.add(ticket.requests[0])

    def _ticket(
        self,
        ids: list[int],
        sampling: Sampling,
        seed: int,
        index: int,
        *,
        where: str | None = None,
        read: bool = False,
        priority: int = 0,
        finished: Callable[[Ticket], None] | None = None,
    ) -> Ticket:
        """A prompt with its answers, not yet open."""
        requests = self._intake.requests(ids, sampling, seed, index, where=where, read=read, priority=priority)
        self.runner.scheduler.check(requests[0])
        return Ticket("", requests, finished)

    def _drain(self, tickets: list[Ticket], finished: deque[Ticket]) -> Iterator[tuple[int, Completion]]:
        places = {ticket: index for index, ticket in enumerate(tickets)}
        failed: list[OarsmithError] = []
        num_left = len(tickets)
        try:
            for ticket in tickets:
                self._open(ticket)
            while num_left:
                self.advance()
                while finished:
                    ticket = finished.popleft()
                    num_left -= 1
                    if ticket.error is None:
                        yield places[ticket], self.completion(ticket)
                    else:
                        failed.append(ticket.error)
        finally:
            for ticket in tickets:
                self.abort(ticket.id)
        if failed:
            # Only now: the others have their answers.
            raise failed[0]

    def completion(self, ticket: Ticket) -> Completion:
        """The answers to a prompt that is done."""
        return self._intake.completion(ticket.requests)


def _seed(sampling: Sampling) -> int:
    return secrets.randbits(63) if sampling.seed is None else sampling.seed


def _is_one(prompts: Prompt | Sequence[Prompt]) -> bool:
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], (int, Mapping)))
