"""Prompts to requests, and requests that are done to completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from oarsmith.engine.bad_words import spell_bad_words
from oarsmith.engine.beams import Beams
from oarsmith.engine.grammar import Constraints
from oarsmith.engine.pace import Pace
from oarsmith.engine.reader import TextReader, without_lead
from oarsmith.engine.request import Completion, Request, request_draws
from oarsmith.engine.sampling import Sampling
from oarsmith.engine.state import SamplingState
from oarsmith.errors import ConfigError, DataError
from oarsmith.models.facts import ModelFacts
from oarsmith.models.prefix import find_prefix
from oarsmith.models.spec import PrefixLM
from oarsmith.text import Tokenizer

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""Text to continue as it is, token ids, or a conversation for the chat template (dicts with role and content)."""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A checked prompt, and what it is asked under.

    Attributes:
        seed, index: what its random numbers follow from; ``index`` is its number among those of the same seed.
        where: names it in errors.
        read: whether somebody reads the text token by token.
        adapter: the name of the one it goes through; ``salt``: what tells its keys from those under others.
    """

    ids: list[int]
    sampling: Sampling
    seed: int
    index: int = 0
    where: str | None = None
    read: bool = False
    priority: int = 0
    adapter: str | None = None
    salt: bytes = b""


class Intake:
    """What the engine does with texts; without a tokenizer there are only ids.

    Args:
        num_draft_tokens: most tokens of an answer that are guessed at a time; None: none are.
    """

    def __init__(self, facts: ModelFacts, tokenizer: Tokenizer | None, num_draft_tokens: int | None = None) -> None:
        self._num_draft_tokens = num_draft_tokens
        self._facts = facts
        self._tokenizer = tokenizer
        self._constraints = Constraints(tokenizer, facts.vocab_size)

    def encode(
        self, prompt: Prompt, tools: Sequence[Any] | None, where: str | None, variables: Mapping[str, Any]
    ) -> list[int]:
        """Ids of a prompt, checked (see ``Engine.encode``)."""
        ids = self._ids(prompt, tools, variables)
        if not ids:
            raise DataError("the prompt is empty: not a single token", where=where, fix="write something to answer")
        limit = self._facts.room
        if len(ids) >= limit:
            raise DataError(
                f"the prompt has {len(ids)} tokens; the model's context of {limit} leaves no room for an answer",
                where=where,
                fix=f"shorten it to at most {limit - 1} tokens",
            )
        low, high, size = min(ids), max(ids), self._facts.vocab_size
        if low < 0 or high >= size:
            raise DataError(
                f"token id {low if low < 0 else high} is outside the model's vocabulary of {size}",
                where=where,
                fix="use the tokenizer that belongs to this model",
            )
        if isinstance(rule := self._facts.visibility, PrefixLM):
            find_prefix(rule, ids)
        return ids

    def prepare(self, sampling: Sampling) -> None:
        """See ``Engine.prepare``."""
        self._constraints.of(sampling)

    def _ids(self, prompt: Prompt, tools: Sequence[Any] | None, variables: Mapping[str, Any]) -> list[int]:
        if isinstance(prompt, str):
            return self._needed_tokenizer().encode(prompt)
        if len(prompt) > 0 and isinstance(prompt[0], Mapping):
            messages = cast(Sequence[Mapping[str, Any]], prompt)
            return self._needed_tokenizer().encode_chat(messages, tools, **{"add_generation_prompt": True, **variables})
        return [int(index) for index in cast(Sequence[int], prompt)]

    def _needed_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise ConfigError("this engine has no tokenizer", fix="pass tokenizer=, or give prompts as token ids")
        return self._tokenizer

    def requests(self, ask: Ask) -> list[Request]:
        """A request for each answer; the others are siblings of the first, or seats of its search."""
        ids, sampling = ask.ids, ask.sampling
        stop_ids = set(sampling.stop_ids)
        if self._tokenizer is not None and not sampling.ignore_eos:
            stop_ids |= set(self._tokenizer.stop_ids)
        limit = min(sampling.max_new_tokens, self._facts.room - len(ids))
        bad_words, beams = spell_bad_words(sampling, self._tokenizer), sampling.num_beams > 1
        requests = []
        for answer in range(sampling.num_samples):
            state = SamplingState(
                sampling,
                ids,
                request_draws(ask.seed, ask.index, answer),
                vocab_size=self._facts.vocab_size,
                grammar=self._constraints.of(sampling),
                stop_ids=stop_ids,
                bad_words=bad_words,
            )
            request = Request(
                id=ask.where or "request",
                prompt=ids,
                limit=limit,
                stop_ids=frozenset(stop_ids),
                state=state,
                reader=self._reader(ids, sampling) if (ask.read and not beams) or sampling.stop else None,
                priority=ask.priority,
                prompt_logprobs=None if answer else sampling.prompt_logprobs,
                adapter=ask.adapter,
                salt=ask.salt,
                num_virtual=self._facts.num_virtual,
                pace=None if beams or self._num_draft_tokens is None else Pace(self._num_draft_tokens),
            )
            requests.append(request)
        if beams:
            Beams(requests)
        else:
            requests[0].siblings = requests[1:]
        return requests

    def _reader(self, ids: Sequence[int], sampling: Sampling) -> TextReader:
        return TextReader(
            self._needed_tokenizer(),
            sampling.stop,
            self._lead(ids),
            least=sampling.min_new_tokens,
            skip_special_tokens=sampling.skip_special_tokens,
        )

    def _lead(self, prompt: Sequence[int]) -> str:
        return "" if self._tokenizer is None else self._tokenizer.answer_lead(prompt)

    def completion(self, requests: Sequence[Request]) -> Completion:
        """The answers to a prompt; of more than are wanted, those that the model finds likeliest."""
        sampling = requests[0].state.sampling
        prompt_logprobs = None if sampling.prompt_logprobs is None else tuple(requests[0].prompt_choices)
        if (beams := requests[0].beams) is not None:
            requests = beams.results()[: sampling.n]
        elif len(requests) > sampling.n:
            requests = sorted(requests, key=_mean_logprob, reverse=True)[: sampling.n]
        first, *others = (self._answer(request) for request in requests)
        return replace(first, prompt_logprobs=prompt_logprobs, others=tuple(others))

    def _answer(self, request: Request) -> Completion:
        assert request.finish_reason is not None, request.ids
        if request.reader is not None:
            text = request.reader.text
        elif self._tokenizer is not None:
            text = self._tokenizer.decode(request.text_ids, request.state.sampling.skip_special_tokens)
            text = without_lead(text, self._lead(request.prompt))
        else:
            text = ""
        wanted = request.state.sampling.logprobs is not None
        return Completion(
            text,
            tuple(request.ids),
            tuple(request.prompt),
            request.finish_reason,
            logprobs=tuple(request.choices) if wanted else None,
            score=request.score,
        )


def as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts, where one may stand for itself."""
    one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], (int, Mapping)))
    return [cast(Prompt, prompts)] if one else list(cast(Sequence[Prompt], prompts))


def _mean_logprob(request: Request) -> float:
    logprobs = [choice.logprob for choice in request.choices if choice.logprob is not None]
    assert len(logprobs) == request.num_generated > 0, request.id
    return sum(logprobs) / len(logprobs)
