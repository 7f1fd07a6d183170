"""The engine: prompts in, answers out. Its inside (cache, batching) may change; this interface stays."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oarsmith.engine.adapters import Adapters, AdapterSource
from oarsmith.engine.answers import AnswerReader
from oarsmith.engine.desk import Desk
from oarsmith.engine.drain import drain
from oarsmith.engine.intake import Ask, Intake, Prompt, as_batch
from oarsmith.engine.native_model import Compute
from oarsmith.engine.options import CacheDtype, Sizes, Speculation
from oarsmith.engine.request import Completion
from oarsmith.engine.runner import Runner
from oarsmith.engine.running import native_runner
from oarsmith.engine.sampling import Sampling
from oarsmith.engine.served import ModelOptions, open_guesser, serve
from oarsmith.engine.stream import Stream
from oarsmith.engine.ticket import Output, Ticket
from oarsmith.errors import ConfigError, ModelError
from oarsmith.model_path import find_tokenizer
from oarsmith.text import Tokenizer

if TYPE_CHECKING:
    from oarsmith.adapters.bank import AdapterBank
    from oarsmith.data.answers import Answered
    from oarsmith.models.decoder import Decoder

_GREEDY = Sampling()
_SCORED_BY = "oarsmith eval, Engine.score, or /pooling of a server"


class Engine:
    """Generates with one model. Calls, streams and added requests that are open at the same time share its steps.

    The tokens drawn for a request follow from its prompt, the sampling's seed and its place in the call; what else is
    in the batch changes only the rounding of the matrix products. The engine keeps what it computed of prompts: where
    the model's weights are changed, call ``forget``.

    Args:
        model: a model directory, an adapter directory, a run folder, or a loaded decoder in eval mode.
        tokenizer: not given: the one that lies with a path. An engine without one takes token ids only.
        dtype: for a path; ``auto`` is what the files hold, but float32 where the device would have to emulate that.
        device, adapter: for a path; ``auto`` is the GPU where there is one; an adapter to put on top.
        weights: for a path: round them to ``int8`` or ``int4``, in groups of 32, each with its own scale.
        compute: for a path: ``native``: the compiled step, which CPUs have; ``torch``: PyTorch; ``auto``: the compiled
            step where it can serve. Packed weights are kept for the next start. A loaded decoder is served by PyTorch
            from its own weights, with ``native`` by the compiled step from a copy of them.
        num_threads: for a path: of the compiled step; not given: as many as the process may run on.
        batch_size: most requests that are worked on at the same time; others wait.
        num_pages: pages of the key/value cache; not given: as many as ``batch_size`` requests can fill, but at most
            half of the memory that is free. Where requests need more, the last of them are computed again later.
        cache_bytes: memory of the cache, in place of ``num_pages``.
        cache_dtype: ``int8``: keep keys and values in 8 bits, in groups of 32 with a scale each: near half the memory
            of bf16. ``fp8``: in E4M3. ``auto``: as a quantized checkpoint says, else in the type they are computed in.
            A checkpoint's own scales are used where it has some of this kind.
        block_size: tokens of a page.
        max_step_tokens: most tokens computed at once: longer prompts come in pieces, between which others go on. Not
            given: 512 on a CPU, 2,048 on a GPU, and no fewer than two for every answer.
        prefix_caching: prompts that begin alike share pages, also with those answered before. Families whose keys do
            not follow from the tokens before them alone never do.
        speculative: who guesses tokens that the model then checks several at a time: ``ngram``: what followed when the
            text last ended as it does now; or a smaller model with the same vocabulary. Answers are distributed as
            without; greedy ones, and with ``ngram`` all, are the same.
        num_draft_tokens: most tokens that are guessed at a time.
        adapters: adapters by the names under which requests may choose them; ``add_adapter`` takes more.
        any_base: for a path: take adapters also that were trained on another base, where their files tell.
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
        weights: str | None = None,
        compute: Compute = "auto",
        num_threads: int | None = None,
        batch_size: int = 8,
        num_pages: int | None = None,
        cache_bytes: int | None = None,
        cache_dtype: CacheDtype = "auto",
        block_size: int = 64,
        max_step_tokens: int | None = None,
        prefix_caching: bool = True,
        speculative: str | Path | Decoder | None = None,
        num_draft_tokens: int = 4,
        ngram_min: int = 1,
        ngram_max: int = 3,
        adapters: Mapping[str, AdapterSource] | None = None,
        any_base: bool = False,
    ) -> None:
        self._speculation = Speculation(
            by=speculative, num_draft_tokens=num_draft_tokens, ngram_min=ngram_min, ngram_max=ngram_max
        )
        self._sizes = Sizes(
            batch_size=batch_size,
            num_pages=num_pages,
            cache_bytes=cache_bytes,
            cache_dtype=cache_dtype,
            block_size=block_size,
            max_step_tokens=max_step_tokens,
            prefix_caching=prefix_caching,
            tokens_each=1 if speculative is None else 1 + num_draft_tokens,
        )
        options = ModelOptions(
            dtype=dtype,
            device=device,
            adapter=adapter,
            any_base=any_base,
            weights=weights,
            compute=compute,
            num_threads=num_threads,
        )
        if tokenizer is None and isinstance(model, (str, Path)):
            tokenizer = find_tokenizer(model, adapter)
        self.tokenizer = tokenizer
        self._served = serve(model, options, block_size)
        self.batch_size = batch_size
        self._draft_model = open_guesser(self._served, self._speculation, self.tokenizer, options, block_size)
        self._intake = Intake(self._served.facts, self.tokenizer, None if speculative is None else num_draft_tokens)
        self._desk = Desk(self._intake)
        self._adapters = Adapters(self._desk, None if any_base or not isinstance(model, (str, Path)) else model)
        if adapters is not None:
            self._adapters.bank = self._new_bank()
            for name, path in adapters.items():
                self.add_adapter(name, path)

    @property
    def model(self) -> Decoder:
        """The decoder. Where the compiled step serves, it is loaded when this is first asked for."""
        return self._served.decoder

    @property
    def how(self) -> str:
        """What computes its steps, in words."""
        return self._served.how if self._adapters.bank is None else "PyTorch (requests choose adapters)"

    @cached_property
    def runner(self) -> Runner:
        """The cache and what fills it; made when the first prompt comes."""
        if self._served.native is not None and self._adapters.bank is None and self._draft_model is None:
            return native_runner(self._served.native, self._sizes, self._speculation)
        from oarsmith.engine.build import build_runner

        return build_runner(self._served, self._adapters.bank, self._sizes, self._speculation, self._draft_model)

    def _new_bank(self) -> AdapterBank:
        from oarsmith.adapters.bank import AdapterBank

        return AdapterBank(self.model)

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and answer together."""
        return self._served.facts.room

    @property
    def guesses(self) -> tuple[int, int]:
        """Tokens that were guessed so far (``speculative``), and how many of them were right."""
        return self.runner.num_drafted, self.runner.num_accepted

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling] | None = None,
        *,
        adapter: str | None = None,
    ) -> list[Completion]:
        """Answers in the order of the prompts.

        Args:
            prompts: one prompt or a list of them.
            sampling: not given: greedy, 256 tokens. A list has one for each prompt.
            adapter: the name of the one they go through; not given: none.

        Raises:
            OarsmithError: a prompt that is empty, longer than the context or outside the vocabulary; no such adapter;
                a list of samplings of another length.
        """
        batch = as_batch(prompts)
        found = dict(self.as_completed(batch, sampling, adapter=adapter))
        return [found[index] for index in range(len(batch))]

    def as_completed(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling] | None = None,
        *,
        adapter: str | None = None,
    ) -> Iterator[tuple[int, Completion]]:
        """(index of the prompt, its answer), each as soon as it is finished. All prompts are checked first."""
        batch = [self.encode(prompt, where=f"prompt {index}") for index, prompt in enumerate(prompts)]
        if sampling is None or isinstance(sampling, Sampling):
            asks = [self._ask([], sampling, adapter)] * len(batch)
        else:
            asks = [self._ask([], each, adapter) for each in sampling]
        if len(asks) != len(batch):
            what = f"there are {len(asks)} samplings for {len(batch)} prompts"
            raise ConfigError(what, where="sampling", fix="give one for all, or one for each")
        asks = [
            replace(ask, ids=ids, index=index, where=f"prompt {index}")
            for index, (ask, ids) in enumerate(zip(asks, batch, strict=True))
        ]
        return drain(self._desk, [self._ticket(ask) for ask in asks])

    def stream(
        self,
        prompt: Prompt,
        sampling: Sampling | None = None,
        *,
        tools: Sequence[Any] | None = None,
        adapter: str | None = None,
    ) -> Stream:
        """The answer's text in pieces: whole characters, and never a part of a stop text.

        Raises:
            OarsmithError: as `generate`; or the engine has no tokenizer.
        """
        ask = self._ask(self.encode(prompt, tools=tools), sampling, adapter)
        if ask.sampling.num_samples > 1:
            what = "a stream is one answer, and known token by token"
            raise ConfigError(what, where="n", fix="leave out n, best_of and num_beams, or use generate")
        ticket = self._ticket(replace(ask, read=True))
        self._desk.open(ticket)
        return Stream(self._desk, ticket)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling: Sampling | None = None,
        *,
        tools: Sequence[Any] | None = None,
        adapter: str | None = None,
    ) -> Completion:
        """The answer to a conversation that ends with a user's (or a tool's) message."""
        return self.generate(self.encode(messages, tools=tools), sampling, adapter=adapter)[0]

    def encode(
        self, prompt: Prompt, *, tools: Sequence[Any] | None = None, where: str | None = None, **variables: Any
    ) -> list[int]:
        """Ids of a prompt, checked.

        Args:
            tools: JSON schemas of functions, for a conversation.
            where: names the prompt in errors.
            variables: what else the chat template reads; ``add_generation_prompt`` is True unless it is among them.

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
        adapter: str | None = None,
    ) -> str:
        """Let a prompt wait for its turn; its id, under which ``step`` tells what becomes of it.

        Args:
            priority: those with a higher one come first; among equals, those that came first.
            id: names it; not given: a new name.
            index: its number among those that share a seed: what is drawn for it is what ``generate`` draws for that
                place in a list.
            adapter: as `generate`.

        Raises:
            OarsmithError: as `generate`; or the id is in use.
        """
        self._desk.check(id)
        ask = self._ask(self.encode(prompt, where=id), sampling, adapter)
        ask = replace(ask, index=index, where=id, read=self.tokenizer is not None, priority=priority)
        return self._desk.open(self._ticket(ask), id, told=True)

    def prepare(self, sampling: Sampling) -> None:
        """Compile a sampling's constraint, so that ``add`` finds it made; from any thread.

        Raises:
            OarsmithError: it cannot be followed.
        """
        self._intake.prepare(sampling)

    def step(self) -> list[Output]:
        """What one step, or those taken for others in the meantime, brought for the prompts that were added."""
        return self._desk.step()

    def abort(self, id: str) -> bool:
        """Give up a request at once, and free its pages; False: it is not there, or not any more."""
        return self._desk.abort(id)

    @property
    def busy(self) -> bool:
        """Whether anything is not finished, or was not told yet."""
        return self._desk.busy

    def embed(self, documents: Sequence[Sequence[int]]) -> list[list[float]]:
        """A vector of length 1 for each document's ids: the mean of its last hidden states. PyTorch computes it."""
        from oarsmith.engine.embedding import embed

        return embed(self.model, documents)

    @property
    def num_scores(self) -> int | None:
        """Of a reward model (one), which scores answers and writes none; None: the model writes."""
        return self._served.facts.num_scores

    def require_text(self) -> None:
        """Refuse a model that writes none.

        Raises:
            ModelError: it is a reward model.
        """
        if self.num_scores is not None:
            raise ModelError("this is a reward model: it scores answers and writes none", fix=f"use {_SCORED_BY}")

    @cached_property
    def answers(self) -> AnswerReader:
        """Reads what ``score_rows`` scores."""
        return AnswerReader(self.tokenizer, self._served.facts)

    def score(self, conversations: Prompt | Sequence[Prompt]) -> list[float]:
        """A reward model's scores of conversations that end with an answer, in their order. PyTorch computes them.

        Args:
            conversations: one or a list of them: messages, or a text or ids as they are, scored at the last token.

        Raises:
            OarsmithError: the model gives no scores, or there is no answer, or one is longer than the context.
        """
        read = enumerate(as_batch(conversations))
        return [scores[0] for scores in self.score_rows([self.answers.read(c, where=f"text {n}") for n, c in read])]

    def score_rows(self, rows: Sequence[Answered]) -> list[tuple[float, ...]]:
        """As `score`, of all answers of encoded rows; a prompt is read once for its answers."""
        from oarsmith.engine.scoring import score_rows

        return score_rows(self.model, rows)

    def score_steps(self, rows: Sequence[Answered], reward_tokens: tuple[int, int]) -> list[tuple[float, ...]]:
        """How good the steps of answers are (``answers.read_steps``), from 0 to 1, by the ids for good and bad."""
        from oarsmith.engine.scoring import score_steps

        return score_steps(self.model, rows, reward_tokens)

    def forget(self) -> None:
        """Compute everything anew from now on: the model's weights are others (the compiled step packs them again)."""
        self._served.renew()
        self.runner.scheduler.forget()

    def add_adapter(self, name: str, path: AdapterSource) -> None:
        """Take an adapter (PEFT's layout, or a run folder that holds one) that requests may name.

        Args:
            path: of the adapter; or several with a weight each, whose updates are added up.

        Raises:
            OarsmithError: the name is taken, or the adapter cannot be read or does not fit the model.
        """
        if self._adapters.add(name, path, self._new_bank):
            self.__dict__.pop("runner", None)

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            ConfigError: there is none of this name, or a request that is not finished goes through it.
        """
        self._adapters.remove(name)

    def _ask(self, ids: list[int], sampling: Sampling | None, adapter: str | None) -> Ask:
        sampling = sampling or _GREEDY
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        return Ask(ids=ids, sampling=sampling, seed=seed, adapter=adapter, salt=self._adapters.salt(adapter))

    def _ticket(self, ask: Ask) -> Ticket:
        """A prompt with its answers, not yet open."""
        self.require_text()
        requests, self._desk.runner = self._intake.requests(ask), self.runner
        self.runner.scheduler.check(requests[0])
        return Ticket("", requests)
