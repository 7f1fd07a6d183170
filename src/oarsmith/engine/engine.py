"""The engine: prompts in, answers out. Its inside (cache, batching) may change; this interface stays."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch

from oarsmith.engine.memory import default_num_pages
from oarsmith.engine.pages import PagePool
from oarsmith.engine.reader import TextReader, without_lead
from oarsmith.engine.request import Completion, Request, request_generator
from oarsmith.engine.runner import Runner
from oarsmith.engine.sampler import SamplingState
from oarsmith.engine.sampling import Sampling
from oarsmith.engine.scheduler import Scheduler
from oarsmith.engine.stream import Stream
from oarsmith.engine.ticket import Output, Ticket
from oarsmith.errors import ConfigError, DataError, ModelError, OarsmithError
from oarsmith.loading import find_tokenizer, load_model
from oarsmith.models import visibility
from oarsmith.models.caching import CacheRules
from oarsmith.models.decoder import Decoder
from oarsmith.models.spec import PrefixLM
from oarsmith.text import Tokenizer
from oarsmith.training.precision import has_fast_bf16

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""Text to continue as it is, token ids, or a conversation for the chat template (dicts with role and content)."""

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
        return Runner(self.model, self.model.new_cache(self.batch_size, block_size, num_pages), scheduler)

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
        ids = self._ids(prompt, tools, variables)
        if not ids:
            raise DataError("the prompt is empty: not a single token", where=where, fix="write something to answer")
        if len(ids) >= self.context_length:
            raise DataError(
                f"the prompt has {len(ids)} tokens; the model's context of {self.context_length} leaves no room for "
                "an answer",
                where=where,
                fix=f"shorten it to at most {self.context_length - 1} tokens",
            )
        low, high, size = min(ids), max(ids), self.model.spec.vocab_size
        if low < 0 or high >= size:
            raise DataError(
                f"token id {low if low < 0 else high} is outside the model's vocabulary of {size}",
                where=where,
                fix="use the tokenizer that belongs to this model",
            )
        if isinstance(rule := self.model.spec.visibility, PrefixLM):
            visibility.find_prefix(rule, ids)
        return ids

    def _ids(self, prompt: Prompt, tools: Sequence[Any] | None, variables: Mapping[str, Any]) -> list[int]:
        if isinstance(prompt, str):
            return self._needed_tokenizer().encode(prompt)
        if len(prompt) > 0 and isinstance(prompt[0], Mapping):
            messages = cast(Sequence[Mapping[str, Any]], prompt)
            return self._needed_tokenizer().encode_chat(messages, tools, True, **variables)
        return [int(index) for index in cast(Sequence[int], prompt)]

    def _needed_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ConfigError("this engine has no tokenizer", fix="pass tokenizer=, or give prompts as token ids")
        return self.tokenizer

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
        for request in self.runner.step():
            ticket = self._ticket_of[request]
            if ticket.done and ticket.id in self.open_tickets:
                del self.open_tickets[ticket.id]
                for answer in ticket.requests:
                    del self._ticket_of[answer]
                ticket.finished(ticket)
            if ticket.told is not None:
                ticket.told(ticket, request)

    def _tell(self, ticket: Ticket, request: Request) -> None:
        choice = request.choices[-1] if request.choices else None
        text = "" if request.reader is None else request.reader.take()
        completion = self.completion(ticket) if ticket.done and ticket.error is None else None
        index = ticket.requests.index(request)
        self._outputs.append(Output(ticket.id, index, choice, text, completion, request.error))

    def _open(self, ticket: Ticket, id: str | None = None) -> None:
        leader = ticket.requests[0]
        leader.arrival = self._num_added
        self._num_added += 1
        for sibling in leader.siblings:
            sibling.arrival = leader.arrival
        ticket.id = f"request {leader.arrival}" if id is None else id
        self.runner.scheduler.add(leader)
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
        stop_ids = set(sampling.stop_ids)
        if self.tokenizer is not None and not sampling.ignore_eos:
            stop_ids |= set(self.tokenizer.stop_ids)
        lead = self._lead(ids)
        request = Request(
            id=where or "request",
            prompt=ids,
            limit=min(sampling.max_new_tokens, self.context_length - len(ids)),
            stop_ids=frozenset(stop_ids),
            state=SamplingState(sampling, ids, request_generator(seed, index), vocab_size=self.model.spec.vocab_size),
            reader=TextReader(self._needed_tokenizer(), sampling.stop, lead) if read or sampling.stop else None,
            priority=priority,
        )
        self.runner.scheduler.check(request)
        return Ticket("", [request], finished)

    def _lead(self, prompt: Sequence[int]) -> str:
        return "" if self.tokenizer is None else self.tokenizer.answer_lead(prompt)

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
        """The answer to a prompt that is done."""
        return self._completion(ticket.requests[0])

    def _completion(self, request: Request) -> Completion:
        assert request.finish_reason is not None, request.ids
        if request.reader is not None:
            text = request.reader.text
        elif self.tokenizer is not None:
            text = self.tokenizer.decode(request.text_ids, skip_special_tokens=True)
            text = without_lead(text, self._lead(request.prompt))
        else:
            text = ""
        return Completion(text, tuple(request.ids), tuple(request.prompt), request.finish_reason)


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
