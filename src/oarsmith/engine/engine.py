"""The engine: prompts in, answers out. Its inside (cache, batching) may change; this interface stays."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch

from oarsmith.engine.backend import DecoderBackend
from oarsmith.engine.intake import Intake, Prompt
from oarsmith.engine.memory import default_num_pages
from oarsmith.engine.pages import PagePool
from oarsmith.engine.request import Completion, Request
from oarsmith.engine.runner import Runner
from oarsmith.engine.sampling import Sampling
from oarsmith.engine.scheduler import Scheduler
from oarsmith.engine.stream import Stream
from oarsmith.engine.ticket import Output, Ticket
from oarsmith.errors import ConfigError, ModelError, OarsmithError
from oarsmith.loading import find_tokenizer, load_model
from oarsmith.models.caching import CacheRules
from oarsmith.models.decoder import Decoder
from oarsmith.text import Tokenizer
from oarsmith.training.precision import has_fast_bf16

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
    ) -> None:
        least = {"batch_size": (batch_size, 1), "num_pages": (num_pages, 1), "block_size": (block_size, 1)}
        least["max_step_tokens"] = (max_step_tokens, max(batch_size, 1))
        for name, (value, limit) in least.items():
            if value is not None and value < limit:
                raise ConfigError(f"{name} is {value}", where=name, fix=f"{name} must be at least {limit}")
        if isinstance(model, Decoder):
            if (dtype, device, adapter) != ("auto", "auto", None):
                what = "dtype, device and adapter belong to a path, not to a model that is loaded already"
                raise ConfigError(what, fix="give them to load_model")
            if model.training:
                raise ModelError("the model is in training mode (dropout changes answers)", fix="call model.eval()")
            self.model = model
            self.tokenizer = tokenizer
        else:
            self.tokenizer = find_tokenizer(model, adapter) if tokenizer is None else tokenizer
            self.model = _load(model, dtype, device, adapter)
        self.batch_size = batch_size
        self._intake = Intake(self.model.spec, self.tokenizer)
        self.open_tickets: dict[str, Ticket] = {}
        self._sizes = (num_pages, block_size, max_step_tokens, prefix_caching)
        self._ticket_of: dict[Request, Ticket] = {}
        self._outputs: list[Output] = []
        self._num_added = 0

    @cached_property
    @torch.inference_mode()
    def runner(self) -> Runner:
        """The cache and what fills it; made when the first prompt comes."""
        num_pages, block_size, max_step_tokens, prefixes = self._sizes
        if num_pages is None:
            num_pages = default_num_pages(self.model, self.batch_size, block_size)
        scheduler = Scheduler(
            PagePool(num_pages, block_size),
            CacheRules.of(self.model.spec),
            max_running=self.batch_size,
            max_step_tokens=max_step_tokens,
            prefixes=prefixes,
        )
        cache = self.model.new_cache(self.batch_size, block_size, num_pages)
        return Runner(DecoderBackend(self.model, cache), scheduler)

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and answer together."""
        return self.model.spec.max_positions

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
            raise ConfigError("a stream is one answer", where="n", fix="leave out n and best_of, or use generate")
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

    def add(self, prompt: Prompt, sampling: Sampling | None = None, *, priority: int = 0, id: str | None = None) -> str:
        """Let a prompt wait for its turn; ``step`` tells what becomes of it.

        Args:
            priority: those with a higher one come first; among equals, those that came first.
            id: names it; not given: a new name.

        Returns:
            Its id.

        Raises:
            OarsmithError: as `generate`; or the id is in use.
        """
        sampling = sampling or _GREEDY
        if id in self.open_tickets:
            raise ConfigError(f"a request with the id {id} is not finished yet", where="id", fix="use another id")
        ids, read = self.encode(prompt, where=id), self.tokenizer is not None
        ticket = self._ticket(ids, sampling, _seed(sampling), 0, where=id, read=read, priority=priority)
        ticket.told = self._tell
        self._open(ticket, id)
        return ticket.id

    def step(self) -> list[Output]:
        """What one step, or those taken for others in the meantime, brought for the prompts that were added."""
        if not self._outputs:
            self.advance()
        outputs, self._outputs = self._outputs, []
        return outputs

    def abort(self, id: str) -> bool:
        """Give up a request at once, and free its pages; False: it is not there, or not any more."""
        ticket = self.open_tickets.pop(id, None)
        if ticket is None:
            return False
        for request in ticket.requests:
            del self._ticket_of[request]
            if not request.done:
                self.runner.scheduler.remove(request)
        self._outputs = [output for output in self._outputs if output.id != id]
        return True

    @property
    def busy(self) -> bool:
        """Whether anything is not finished, or was not told yet."""
        return bool(self.open_tickets or self._outputs)

    def forget(self) -> None:
        """Compute everything anew from now on: the model's weights are others."""
        scheduler = self.runner.scheduler
        for request in list(scheduler.running):
            scheduler.preempt(request)
        scheduler.pool.forget()

    def advance(self) -> None:
        """One step for everybody."""
        advanced = [(self._ticket_of[request], request) for request in self.runner.step()]
        for ticket, _ in advanced:
            if ticket.done and self.open_tickets.pop(ticket.id, None) is not None:
                for answer in ticket.requests:
                    del self._ticket_of[answer]
                ticket.finished(ticket)
        last = dict(advanced)
        for ticket, request in advanced:
            if ticket.told is not None:
                ticket.told(ticket, request, last[ticket] is request)

    def _tell(self, ticket: Ticket, request: Request, last: bool) -> None:
        sampling = request.state.sampling
        # Of more answers than are wanted, nobody knows yet which will be given.
        shown = sampling.num_samples == sampling.n
        choice = request.choices[-1] if shown and request.error is None else None
        text = request.reader.take() if shown and request.reader is not None else ""
        completion = self.completion(ticket) if last and ticket.done and ticket.error is None else None
        if not shown and completion is None and request.error is None:
            return
        index = ticket.requests.index(request) if shown else 0
        self._outputs.append(Output(ticket.id, index, choice, text, completion, request.error))

    def _open(self, ticket: Ticket, id: str | None = None) -> None:
        ticket.id = f"request {self._num_added}" if id is None else id
        for request in ticket.requests:
            request.arrival = self._num_added
            self._num_added += 1
        self.runner.scheduler.add(ticket.requests[0])
        self.open_tickets[ticket.id] = ticket
        for request in ticket.requests:
            self._ticket_of[request] = ticket

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
        finished: Callable[[Ticket], None] = lambda _: None,
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


def _load(path: str | Path, dtype: str, device: str, adapter: str | Path | None) -> Decoder:
    model = load_model(path, dtype=dtype, device=device, adapter=adapter)
    weight = model.embedding.weight
    native = weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and has_fast_bf16(weight.device))
    if dtype == "auto" and weight.device.type == "cpu" and not native:
        model.float()
    return model


def _seed(sampling: Sampling) -> int:
    return secrets.randbits(63) if sampling.seed is None else sampling.seed


def _is_one(prompts: Prompt | Sequence[Prompt]) -> bool:
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], (int, Mapping)))
