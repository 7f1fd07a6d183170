"""The engine: prompts in, answers out. Its inside (cache, batching) may change; this interface stays."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from oarsmith.engine.reader import TextReader, without_lead
from oarsmith.engine.request import Completion, Request, request_generator
from oarsmith.engine.runner import Runner
from oarsmith.engine.sampling import Sampling
from oarsmith.errors import ConfigError, DataError, ModelError
from oarsmith.loading import find_tokenizer, load_model
from oarsmith.models.decoder import Decoder
from oarsmith.text import Tokenizer
from oarsmith.training.precision import has_fast_bf16

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""Text to continue as it is, token ids, or a conversation for the chat template (dicts with role and content)."""

_GREEDY = Sampling()


class Engine:
    """Generates with one model.

    The tokens drawn for a request follow from its prompt, the sampling's seed and its place in the call; what else is
    in the batch changes only the rounding of the matrix products.

    Args:
        model: a model directory, an adapter directory, a run folder, or a loaded decoder in eval mode.
        tokenizer: not given: the one that lies with a path. An engine without one takes token ids only.
        dtype: for a path; ``auto`` is what the files hold, but float32 where the device would have to emulate that.
        device: for a path; ``auto`` is the GPU where there is one.
        adapter: for a path: a LoRA adapter to put on top.
        batch_size: most requests that are worked on at the same time.

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
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}", where="batch_size", fix="batch_size must be at least 1")
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
        seed = _seed(sampling)
        requests = [self._request(ids, sampling, seed, index, read=False) for index, ids in enumerate(batch)]
        return self._drain(requests, sampling)

    def stream(self, prompt: Prompt, sampling: Sampling | None = None, *, tools: Sequence[Any] | None = None) -> Stream:
        """The answer's text in pieces: whole characters, and never a part of a stop text.

        Raises:
            OarsmithError: as `generate`; or the engine has no tokenizer.
        """
        sampling = sampling or _GREEDY
        request = self._request(self.encode(prompt, tools=tools), sampling, _seed(sampling), 0, read=True)
        return Stream(self, Runner(self.model, sampling, [request], 1), request)

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

    def _request(self, ids: list[int], sampling: Sampling, seed: int, index: int, *, read: bool) -> Request:
        stop_ids = set(sampling.stop_ids)
        if self.tokenizer is not None and not sampling.ignore_eos:
            stop_ids |= set(self.tokenizer.stop_ids)
        lead = self._lead(ids)
        reader = TextReader(self._needed_tokenizer(), sampling.stop, lead) if read or sampling.stop else None
        limit = min(sampling.max_new_tokens, self.context_length - len(ids))
        return Request(ids, limit, frozenset(stop_ids), request_generator(seed, index), reader)

    def _lead(self, prompt: Sequence[int]) -> str:
        return "" if self.tokenizer is None else self.tokenizer.answer_lead(prompt)

    def _drain(self, requests: list[Request], sampling: Sampling) -> Iterator[tuple[int, Completion]]:
        places = {id(request): index for index, request in enumerate(requests)}
        runner = Runner(self.model, sampling, requests, self.batch_size)
        while runner.busy:
            for request in runner.step():
                yield places[id(request)], self.completion(request)

    def completion(self, request: Request) -> Completion:
        """The answer of a finished request."""
        assert request.finish_reason is not None, request.ids
        if request.reader is not None:
            text = request.reader.text
        elif self.tokenizer is not None:
            text = self.tokenizer.decode(request.text_ids, skip_special_tokens=True)
            text = without_lead(text, self._lead(request.prompt))
        else:
            text = ""
        return Completion(text, tuple(request.ids), tuple(request.prompt), request.finish_reason)


class Stream(Iterator[str]):
    """Pieces of an answer; joined they are its text.

    Attributes:
        completion: the whole answer, once the pieces are exhausted.
    """

    def __init__(self, engine: Engine, runner: Runner, request: Request) -> None:
        self.completion: Completion | None = None
        self._engine = engine
        self._runner = runner
        self._request = request

    @property
    def num_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self._request.ids)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self._request.prompt)

    def __next__(self) -> str:
        reader = self._request.reader
        assert reader is not None
        while self._request.finish_reason is None:
            self._runner.step()
            if piece := reader.take():
                return piece
        if self.completion is None:
            self.completion = self._engine.completion(self._request)
            # The cache goes with the runner; a kept stream holds only its answer.
            del self._runner
        raise StopIteration


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
