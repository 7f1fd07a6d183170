"""A reward model, as ``oarsmith reward`` makes it, as a reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from oarsmith.errors import ConfigError, DataError
from oarsmith.rl.completion import Completion
from oarsmith.rl.rewards.options import RewardOptions
from oarsmith.rl.rewards.values import Reward, RewardError, Value, checked, place
from oarsmith.rl.rewards.watch import Watch
from oarsmith.text import Tokenizer

if TYPE_CHECKING:
    from oarsmith.data.answers import Answered
    from oarsmith.engine import Engine


class ModelOptions(RewardOptions):
    """Options of a reward model."""

    dtype: str = Field("auto", description="auto (as the files have it), fp32, bf16 or fp16.")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.")
    num_threads: int | None = Field(None, ge=1, description="Threads; by default as many as the run has.")
    scale: float = Field(1.0, allow_inf_nan=False, description="Scores are (score - shift) * scale.")
    shift: float = Field(0.0, allow_inf_nan=False, description="Subtracted from every score.")
    too_long: float | None = Field(
        None, description="Value of an answer that is longer than the model's context; null: that is an error."
    )


class ModelReward(Reward):
    """Scores of a model with a score head, read at the end of the answer.

    Where its chat template is the policy's, or the policy's prompts are plain text, a prompt is read as it is; else the
    row's conversation is rendered with the model's own.

    Args:
        policy: tokenizer of the model that writes; None: prompts are read as they are.

    Raises:
        OarsmithError: no reward model, or its files cannot be read.
    """

    def __init__(self, options: ModelOptions, *, policy: Tokenizer | None = None) -> None:
        from oarsmith.engine import Engine

        super().__init__(options.name or Path(options.reward).resolve().name)
        self._options = options
        self._engine: Engine = Engine(
            options.reward, dtype=options.dtype, device=options.device, num_threads=options.num_threads
        )
        if self._engine.num_scores != 1:
            what = "this model writes text and gives no scores"
            raise ConfigError(what, where=options.reward, fix="name the directory of a model made by oarsmith reward")
        if self._engine.tokenizer is None:
            raise ConfigError("the reward model has no tokenizer", where=options.reward, fix="copy its files there")
        self._renders = policy is not None and _template(policy) not in (None, _template(self._engine.tokenizer))

    def values(self, batch: Sequence[Completion], watch: Watch) -> list[Value | RewardError]:
        with watch.waiting(f"reward model '{self.name}' on {len(batch)} answers"):
            found: list[Value | RewardError] = [None] * len(batch)
            rows: dict[int, Answered] = {}
            for index, one in enumerate(batch):
                read = self._read(one, place(batch, index))
                if isinstance(read, float | RewardError):
                    found[index] = read
                else:
                    rows[index] = read
            options = self._options
            scores = self._engine.score_rows(list(rows.values())) if rows else []
            for index, (score,) in zip(rows, scores, strict=True):
                value = (score - options.shift) * options.scale
                found[index] = checked(value, name=self.name, where=place(batch, index))
            return found

    def _read(self, one: Completion, where: str) -> Answered | float | RewardError:
        try:
            if not one.text.strip():
                # Nothing was said: what ends an answer is scored behind the prompt.
                return self._read_empty(one, where)
            if not self._renders:
                return self._engine.answers.reply(one.prompt, one.text, where=where)
            said = {"role": "assistant", "content": one.text}
            return self._engine.answers.read([*_asked(one.row), said], tools=_tools(one.row), where=where)
        except DataError as error:
            if self._options.too_long is not None and "more than the model's context" in error.what:
                return self._options.too_long
            return RewardError(f"reward '{self.name}': {error.what}", where=where, fix=error.fix)

    def _read_empty(self, one: Completion, where: str) -> Answered:
        tokenizer = self._engine.tokenizer
        assert tokenizer is not None
        prompt = one.prompt
        if self._renders:
            prompt = tokenizer.apply_chat_template(_asked(one.row), _tools(one.row), add_generation_prompt=True)
        ids = tokenizer.encode(prompt, add_special_tokens=tokenizer.chat_template is None)
        return self._engine.answers.read([*ids, *tokenizer.stop_ids[-1:]], where=where)

    def close(self) -> None:
        del self._engine


def _template(tokenizer: Tokenizer) -> object:
    """What decides how a conversation is rendered; None: there is no template."""
    template = tokenizer.chat_template
    return None if template is None else (template.sources(), tokenizer.special.template_variables())


def _asked(row: Mapping[str, object]) -> list[dict[str, Any]]:
    """The row's conversation up to where the model speaks: ``messages``, or ``prompt``, ``question`` or ``src``.

    Raises:
        DataError: it has none.
    """
    for key in ("messages", "prompt", "question", "src"):
        given = row.get(key)
        if isinstance(given, list) and given and isinstance(given[0], Mapping):
            messages = [dict(message) for message in given]
            return messages[:-1] if messages[-1].get("role") == "assistant" else messages
        if isinstance(given, list) and len(given) == 1:
            given = given[0]
        if isinstance(given, str):
            system = row.get("system")
            lead = [{"role": "system", "content": system}] if isinstance(system, str) and system else []
            return [*lead, {"role": "user", "content": given}]
    what = "the reward model has another chat template than the policy, and the row has no conversation to render"
    raise DataError(what, fix="give the data `messages` or `prompt`, or use a reward model with the policy's template")


def _tools(row: Mapping[str, object]) -> list[Any] | None:
    tools = row.get("tools")
    return tools if isinstance(tools, list) else None


def is_model(path: str) -> bool:
    """Whether there is a directory with a model or a run."""
    return Path(path).expanduser().is_dir()
