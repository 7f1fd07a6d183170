"""What every protocol of the server shares: the engine's worker, the names of its models, limits."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import anyio.to_thread

from oarsmith.engine import Engine, Sampling
from oarsmith.engine.intake import Prompt
from oarsmith.errors import OarsmithError
from oarsmith.serve.callers import current_call
from oarsmith.serve.errors import ApiError, from_oarsmith, invalid
from oarsmith.serve.worker import Answer, ClosedError, Worker
from oarsmith.text import Tokenizer

if TYPE_CHECKING:
    from oarsmith.data.answers import Answered

# Texts that are scored before whatever else waits for the engine.
_AT_ONCE = 16
OPENAI_DEFAULTS: Mapping[str, float] = {"temperature": 1.0}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may ask for.

    Args:
        max_prompt_tokens: of a prompt; None: what the context has room for.
        max_new_tokens: of an answer, also where the client names no limit.
        max_answers: answers to one prompt (n, best_of, num_beams), and prompts of one request together.
        seconds: from when a request came until its answer is given up.
    """

    max_prompt_tokens: int | None = None
    max_new_tokens: int = 4096
    max_answers: int = 16
    seconds: float = 600.0


@dataclass(frozen=True, kw_only=True)
class Steps:
    """How a model judges steps: the text behind each, and the ids of the tokens for good and bad."""

    separator: str
    reward_tokens: tuple[int, int]


@dataclass
class Service:
    """One model behind a server.

    Args:
        name: of the model itself.
        adapters: names of models that are the same with a LoRA adapter.
        defaults: how answers are drawn where a request of OpenAI's protocol does not say (``read_defaults``).
        steps: how steps of answers are judged, where the model does that.
    """

    worker: Worker
    name: str
    adapters: Sequence[str] = ()
    limits: Limits = field(default_factory=Limits)
    defaults: Mapping[str, float] = field(default_factory=lambda: OPENAI_DEFAULTS)
    steps: Steps | None = None
    started: float = field(default_factory=time.time)

    @property
    def tokenizer(self) -> Tokenizer:
        tokenizer = self.worker.engine.tokenizer
        assert tokenizer is not None
        return tokenizer

    @property
    def model_names(self) -> list[str]:
        return [self.name, *self.adapters]

    def adapter_of(self, model: str | None) -> str | None:
        """The adapter that a model's name stands for; None: the model itself, also where no name is given.

        Raises:
            ApiError: there is no such model.
        """
        if model is None or model in ("", self.name):
            return None
        if model in self.adapters:
            return model
        names = ", ".join(self.model_names)
        raise invalid(
            f"there is no model {model[:100]!r}; there is {names}", "model", code="model_not_found", status=404
        )

    async def encode(
        self, prompt: Prompt, *, tools: Sequence[Any] | None = None, param: str | None = None, **variables: Any
    ) -> list[int]:
        """Ids of a prompt (see ``Engine.encode``), checked.

        Raises:
            ApiError: it cannot be answered.
        """
        engine = self.worker.engine

        def run() -> list[int]:
            return engine.encode(prompt, tools=tools, **variables)

        try:
            ids = await anyio.to_thread.run_sync(run)
        except OarsmithError as error:
            raise replace_param(from_oarsmith(error), param) from error
        most = self.limits.max_prompt_tokens
        if most is not None and len(ids) > most:
            raise invalid(f"the prompt has {len(ids)} tokens, more than the {most} that this server takes", param)
        return ids

    async def read_answer(
        self, answer: Prompt, *, tools: Sequence[Any] | None = None, param: str | None = None
    ) -> Answered:
        """An answer that is to be scored (see ``Engine.score``), as ids, checked.

        Raises:
            ApiError: it cannot be scored, or the model gives no scores.
        """
        return await self._read(lambda engine: engine.answers.read(answer, tools=tools), param)

    async def read_steps(
        self, conversation: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None, param: str
    ) -> Answered:
        """As `read_answer`, of a conversation whose answer is steps."""
        assert self.steps is not None, "asked before"
        separator = self.steps.separator
        return await self._read(lambda engine: engine.answers.read_steps(conversation, separator, tools=tools), param)

    async def read_reply(self, prompt: str, answer: str) -> Answered:
        """As `read_answer`, of a prompt and its answer as texts."""
        return await self._read(lambda engine: engine.answers.reply(prompt, answer), None)

    async def _read(self, read: Callable[[Engine], Answered], param: str | None) -> Answered:
        engine, most = self.worker.engine, self.limits.max_prompt_tokens
        if engine.num_scores is None and self.steps is None:
            raise invalid("the model writes text and gives no scores", "model")
        try:
            row = await anyio.to_thread.run_sync(read, engine)
        except OarsmithError as error:
            raise replace_param(from_oarsmith(error), param) from error
        if most is not None and len(row) > most:
            raise invalid(f"the text has {len(row)} tokens, more than the {most} that this server takes", param)
        return row

    async def score(self, rows: Sequence[Answered]) -> list[tuple[float, ...]]:
        """A reward model's score of each answer, or of its steps; whoever asks pays for the tokens.

        Raises:
            OarsmithError: the caller has too many requests open, or the service is ending.
        """
        if not self.worker.accepting:
            raise ClosedError("the service is ending", fix="ask another one")
        call = current_call.get()
        caller, scores = None if call is None else call.caller, list[tuple[float, ...]]()
        if caller is not None:
            caller.open()
        count = 0
        try:
            for start in range(0, len(rows), _AT_ONCE):
                own = rows[start : start + _AT_ONCE]
                scores += await self.worker.call(lambda engine, own=own: self._score(engine, own))  # type: ignore[misc]
                count += sum(map(len, own))
        finally:
            if call is not None:
                call.num_prompt_tokens += count
            if caller is not None:
                caller.close(count)
        return scores

    def _score(self, engine: Engine, rows: Sequence[Answered]) -> list[tuple[float, ...]]:
        return engine.score_rows(rows) if self.steps is None else engine.score_steps(rows, self.steps.reward_tokens)

    def ask(self, ids: list[int], sampling: Sampling, *, adapter: str | None = None, priority: int = 0) -> Answer:
        """Let a prompt wait for its turn. Whoever asks closes the answer.

        Raises:
            ApiError: too many wait, or the server is ending, or more answers are asked for than may be.
        """
        try:
            self.worker.engine.require_text()
        except OarsmithError as error:
            raise replace_param(from_oarsmith(error), "model") from error
        if sampling.num_samples > self.limits.max_answers:
            most = self.limits.max_answers
            raise invalid(f"{sampling.num_samples} answers to one prompt; this server gives at most {most}", "n")
        try:
            return self.worker.submit(ids, sampling, adapter=adapter, priority=priority)
        except OarsmithError as error:
            raise from_oarsmith(error) from error

    async def prepare(self, sampling: Sampling) -> None:
        """Compile an answer's constraint beside the engine, which would keep everybody waiting for it.

        Raises:
            ApiError: it cannot be followed.
        """
        if not sampling.constraints:
            return
        try:
            await anyio.to_thread.run_sync(self.worker.engine.prepare, sampling)
        except OarsmithError as error:
            raise from_oarsmith(error) from error

    def sampling(self, **values: Any) -> Sampling:
        """The sampling with these values, its length held to the limit.

        Raises:
            ApiError: a value that cannot be.
        """
        most = self.limits.max_new_tokens
        wanted = values.pop("max_new_tokens", None)
        if wanted is not None and wanted > most:
            raise invalid(f"{wanted} tokens are asked for; this server gives at most {most}", "max_tokens")
        try:
            return Sampling(max_new_tokens=most if wanted is None else wanted, **values)
        except OarsmithError as error:
            raise from_oarsmith(error) from error

    def describe(self) -> Mapping[str, object]:
        """For the start's log."""
        return {"models": self.model_names, "computed by": self.worker.engine.how}


def replace_param(error: ApiError, param: str | None) -> ApiError:
    """The same error about another field."""
    return error if param is None else replace(error, param=param)
