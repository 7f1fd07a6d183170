"""Plain Python functions as rewards: of one answer or of many, sync or async."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from pydantic import Field

from oarsmith.errors import ConfigError
from oarsmith.rl.completion import Completion
from oarsmith.rl.rewards.locate import find_function, line_of
from oarsmith.rl.rewards.options import RewardOptions
from oarsmith.rl.rewards.values import Reward, RewardError, Value, checked, place, same_length
from oarsmith.rl.rewards.watch import Watch

_ONE = {"prompt": "prompts", "completion": "completions"}
_MANY = {many: one for one, many in _ONE.items()}
_NONE = inspect.Parameter.empty


class FunctionOptions(RewardOptions):
    """Options of ``file.py:function``."""

    timeout: float | None = Field(
        300.0,
        gt=0,
        description="Seconds that the function may take for a batch. It runs on a thread of its own; null: it runs on "
        "the main thread (which functions that use signals need) without a limit.",
    )


@dataclass(frozen=True)
class TrainerState:
    """What a function learns of the run if it has a parameter ``trainer_state``: updates so far, by both its names."""

    step: int
    global_step: int


def _special(one: Completion) -> dict[str, Any]:
    return {
        "token_ids": list(one.token_ids),
        "completion_ids": list(one.token_ids),
        "truncated": one.truncated,
        "own": list(one.own) or [True] * len(one.token_ids),
    }


_SPECIAL = ("token_ids", "completion_ids", "truncated", "own")
_STATE = ("step", "trainer_state")


class FunctionReward(Reward):
    """A function of ``prompt``, ``completion`` and columns of the row, or of ``prompts``, ``completions`` and lists.

    Parameters are given by name: columns of the row, and ``token_ids`` (or ``completion_ids``), ``truncated``, ``own``,
    ``step``, ``trainer_state``. One that takes ``**row`` gets every column.

    Raises:
        ConfigError: a signature that cannot be called so.
    """

    def __init__(self, call: Callable[..., Any], name: str, *, timeout: float | None = 300.0) -> None:
        super().__init__(name, waits=timeout is not None)
        self._call, self._timeout = call, timeout
        parameters = list(inspect.signature(call).parameters.values())
        kinds = {parameter.kind for parameter in parameters}
        if kinds & {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL}:
            raise ConfigError(f"'{name}' takes arguments by place", fix="def reward(prompt, completion, **row)")
        self._takes_rest = inspect.Parameter.VAR_KEYWORD in kinds
        self._asked = {p.name: p.default for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD}
        one, many = self._asked.keys() & _ONE.keys(), self._asked.keys() & _MANY.keys()
        if bool(one) == bool(many):
            what = f"'{name}' has the parameters {', '.join(map(str, inspect.signature(call).parameters)) or '(none)'}"
            fix = "def reward(prompt, completion, **row) for one answer, or (prompts, completions, **rows) for many"
            raise ConfigError(what, where="reward", fix=fix)
        self._of_many = bool(many)

    @classmethod
    def from_options(cls, options: FunctionOptions) -> FunctionReward:
        """The function that options name."""
        name = options.name or options.reward.rpartition(":")[2]
        return cls(find_function(options.reward), name, timeout=options.timeout)

    def values(self, batch: Sequence[Completion], watch: Watch) -> list[Value | RewardError]:
        text = f"reward function '{self.name}' on {len(batch)} answers"
        with watch.waiting(text):
            if self._timeout is None:
                return self._compute(batch)
            return _within(self._timeout, lambda: self._compute(batch), text)

    def _compute(self, batch: Sequence[Completion]) -> list[Value | RewardError]:
        return asyncio.run(self._compute_async(batch)) if self._is_async() else self._compute_now(batch)

    def _is_async(self) -> bool:
        call: Any = self._call
        return inspect.iscoroutinefunction(call) or (
            not inspect.isroutine(call) and inspect.iscoroutinefunction(type(call).__call__)
        )

    def _compute_now(self, batch: Sequence[Completion]) -> list[Value | RewardError]:
        if self._of_many:
            return self._checked_many(self._called(self._many(batch), f"{len(batch)} answers"), batch)
        found: list[Value | RewardError] = []
        for index in range(len(batch)):
            where = place(batch, index)
            try:
                found.append(checked(self._called(self._one(batch[index], where), where), name=self.name, where=where))
            except RewardError as error:
                found.append(error)
        return found

    async def _compute_async(self, batch: Sequence[Completion]) -> list[Value | RewardError]:
        if self._of_many:
            value = await self._awaited(self._many(batch), f"{len(batch)} answers")
            return self._checked_many(value, batch)
        return list(await asyncio.gather(*(self._one_async(batch, index) for index in range(len(batch)))))

    async def _one_async(self, batch: Sequence[Completion], index: int) -> Value | RewardError:
        where = place(batch, index)
        try:
            return checked(await self._awaited(self._one(batch[index], where), where), name=self.name, where=where)
        except RewardError as error:
            return error

    def _called(self, arguments: dict[str, Any], where: str) -> object:
        try:
            return self._call(**arguments)
        except Exception as error:
            raise self._failed(error, where) from error

    async def _awaited(self, arguments: dict[str, Any], where: str) -> object:
        try:
            return await cast("Awaitable[object]", self._call(**arguments))
        except Exception as error:
            raise self._failed(error, where) from error

    def _failed(self, error: Exception, where: str) -> RewardError:
        what = f"reward '{self.name}' failed: {type(error).__name__}: {error} ({line_of(error)})"
        return RewardError(what, where=where, fix="repair the function, or give it on_error: none")

    def _checked_many(self, value: object, batch: Sequence[Completion]) -> list[Value | RewardError]:
        values = same_length(value, batch, self.name)
        return [checked(one, name=self.name, where=place(batch, index)) for index, one in enumerate(values)]

    def _one(self, one: Completion, where: str) -> dict[str, Any]:
        known = {"prompt": one.prompt, "completion": one.text, **_special(one), **_state(one)}
        arguments: dict[str, Any] = dict(one.row) if self._takes_rest else {}
        for name, default in self._asked.items():
            if name in known:
                arguments[name] = known[name]
            elif name in one.row:
                arguments[name] = one.row[name]
            elif default is _NONE:
                raise self._lacks(name, one, where)
        for name in known.keys() & arguments.keys():
            arguments[name] = known[name]
        if self._takes_rest:
            arguments |= {"prompt": one.prompt, "completion": one.text}
        return arguments

    def _many(self, batch: Sequence[Completion]) -> dict[str, Any]:
        known: dict[str, Any] = {
            "prompts": [one.prompt for one in batch],
            "completions": [one.text for one in batch],
            **_state(batch[0]),
        }
        special = [_special(one) for one in batch]
        known |= {name: [values[name] for values in special] for name in _SPECIAL}
        columns = {name: None for one in batch for name in one.row} if self._takes_rest else {}
        arguments: dict[str, Any] = {}
        for name in dict.fromkeys([*self._asked, *columns]):
            default = self._asked.get(name, None)
            missing = [index for index, one in enumerate(batch) if name not in one.row]
            if name in known:
                arguments[name] = known[name]
            elif len(missing) == len(batch) and default is not _NONE:
                continue
            elif missing and default is _NONE:
                raise self._lacks(name, batch[missing[0]], place(batch, missing[0]))
            else:
                arguments[name] = [one.row.get(name, default) for one in batch]
        if self._takes_rest:
            arguments |= {name: known[name] for name in ("prompts", "completions")}
        return arguments

    def _lacks(self, name: str, one: Completion, where: str) -> RewardError:
        what = f"reward '{self.name}' asks for '{name}', and the row has {', '.join(one.row) or 'no columns'}"
        return RewardError(what, where=where, fix="add the column to the data, or give the parameter a default")


def _state(one: Completion) -> dict[str, Any]:
    return {"step": one.step, "trainer_state": TrainerState(one.step, one.step)}


def _within(seconds: float, compute: Callable[[], list[Value | RewardError]], text: str) -> list[Value | RewardError]:
    """What a computation gives on a thread of its own; one that takes too long is left behind, as no thread can be
    ended."""
    found: list[list[Value | RewardError]] = []
    failed: list[RewardError] = []

    def work() -> None:
        try:
            found.append(compute())
        except RewardError as error:
            failed.append(error)
        except SystemExit as error:
            failed.append(RewardError(f"{text} wanted to end the run ({error!r})", fix="raise an error instead"))

    thread = threading.Thread(target=work, name=text, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise RewardError(f"{text} took longer than {seconds:g} s", fix="make it faster, or give it a larger timeout")
    if failed:
        raise failed[0]
    assert found, text
    return found[0]
