"""All rewards of a run as one: from settings to scores."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from oarsmith.errors import ConfigError
from oarsmith.rl.completion import Completion, Scores
from oarsmith.rl.rewards.functions import FunctionOptions, FunctionReward
from oarsmith.rl.rewards.models import ModelOptions, ModelReward, is_model
from oarsmith.rl.rewards.options import RewardOptions, read_options
from oarsmith.rl.rewards.server import ServerOptions, ServerReward
from oarsmith.rl.rewards.values import Reward, RewardError, Value
from oarsmith.rl.rewards.verifiers.code import CodeOptions, CodeReward
from oarsmith.rl.rewards.verifiers.json_answer import JsonOptions, JsonReward
from oarsmith.rl.rewards.verifiers.maths import MathsOptions, MathsReward
from oarsmith.rl.rewards.verifiers.shape import (
    LengthOptions,
    LengthReward,
    OverlongOptions,
    OverlongReward,
    RepetitionOptions,
    RepetitionReward,
)
from oarsmith.rl.rewards.verifiers.texts import (
    ExactOptions,
    ExactReward,
    FormatOptions,
    FormatReward,
    RegexOptions,
    RegexReward,
)
from oarsmith.rl.rewards.watch import Watch
from oarsmith.text import Tokenizer

_Made = Callable[[Any], Reward]
BUILT_IN: Mapping[str, tuple[type[RewardOptions], _Made]] = {
    "maths": (MathsOptions, MathsReward),
    "json": (JsonOptions, JsonReward),
    "regex": (RegexOptions, RegexReward),
    "exact": (ExactOptions, ExactReward),
    "format": (FormatOptions, FormatReward),
    "length": (LengthOptions, LengthReward),
    "overlong": (OverlongOptions, OverlongReward),
    "repetition": (RepetitionOptions, RepetitionReward),
    "code": (CodeOptions, CodeReward),
}
"""Verifiers by name: their options, and what makes them."""

Settings = str | Mapping[str, Any]
"""A reward: what gives it, or an object with that as ``reward`` and options beside it."""


class Rewards:
    """Several rewards with weights; see `Scorer`.

    Args:
        parts: each with its options (name, weight, what happens on errors).
        watch: told what is waited for; a new one if none is given.
    """

    def __init__(self, parts: Sequence[tuple[Reward, RewardOptions]], *, watch: Watch | None = None) -> None:
        if not parts:
            raise ConfigError("there is no reward", fix="name at least one, such as maths or file.py:function")
        names = [reward.name for reward, _ in parts]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            what = f"two rewards have the name '{min(twice)}'"
            raise ConfigError(what, where="rewards", fix='give one of them another: {"reward": ..., "name": ...}')
        self._parts, self._watch = list(parts), watch or Watch()

    @classmethod
    def from_settings(
        cls,
        settings: Settings | Sequence[Settings],
        *,
        weights: Sequence[float] | None = None,
        tokenizer: Tokenizer | None = None,
        watch: Watch | None = None,
    ) -> Rewards:
        """Rewards that settings name.

        Args:
            settings: each the name of a built-in, ``file.py:function``, ``package.module:function``, an address, the
                directory of a reward model, or an object with ``reward`` and options. One or several.
            weights: one each, in place of ``weight`` in the settings.
            tokenizer: of the model that writes, for reward models with another chat template.

        Raises:
            OarsmithError: what cannot be found, loaded or run; names the reward.
        """
        each = [settings] if isinstance(settings, str | Mapping) else list(settings)
        if weights is not None and len(weights) != len(each):
            what = f"there are {len(weights)} weights for {len(each)} rewards"
            raise ConfigError(what, where="reward_weights", fix="give one weight for each reward")
        parts = []
        for index, one in enumerate(each):
            given: dict[str, Any] = {"reward": one} if isinstance(one, str) else dict(one)
            if weights is not None:
                given["weight"] = float(weights[index])
            parts.append(make_reward(given, tokenizer=tokenizer))
        return cls(parts, watch=watch)

    @property
    def names(self) -> list[str]:
        """Of the rewards, in their order."""
        return [reward.name for reward, _ in self._parts]

    @property
    def failures(self) -> dict[str, int]:
        """Of each reward, how many answers so far had no score because of an error, or zero in place of one."""
        return {reward.name: reward.failures for reward, _ in self._parts}

    @property
    def last_failure(self) -> dict[str, str]:
        """Of each reward that had one, the last of these errors."""
        return {reward.name: reward.last_failure for reward, _ in self._parts if reward.failures}

    def score(self, batch: Sequence[Completion]) -> Scores:
        """The weighted sum of all rewards for each answer, and each one's own values.

        An answer without a score by one reward has the sum of the others; without any, None. Rewards that wait for
        something else do so side by side, while the others compute.

        Raises:
            RewardError: a value that could not be computed, of a reward whose ``on_error`` is raise.
        """
        if not batch:
            return Scores([], {name: [] for name in self.names})
        found = self._all_values(batch)
        parts: dict[str, list[Value]] = {}
        for (reward, options), values in zip(self._parts, found, strict=True):
            assert len(values) == len(batch), (reward.name, len(values), len(batch))
            parts[reward.name] = [self._settled(reward, options, value) for value in values]
        weights = [options.weight for _, options in self._parts]
        return Scores([_weighted(of, weights) for of in zip(*parts.values(), strict=True)], parts)

    def waiting_for(self) -> str:
        """What is waited for, with its name and for how long; "": nothing."""
        return self._watch.text()

    def close(self) -> None:
        """Give back models and processes."""
        for reward, _ in self._parts:
            reward.close()

    def _settled(self, reward: Reward, options: RewardOptions, value: Value | RewardError) -> Value:
        if not isinstance(value, RewardError):
            return value
        if options.on_error == "raise":
            raise value
        reward.failures += 1
        reward.last_failure = str(value)
        return None

    def _all_values(self, batch: Sequence[Completion]) -> list[Sequence[Value | RewardError]]:
        def compute(reward: Reward) -> Sequence[Value | RewardError]:
            try:
                return reward.values(batch, self._watch)
            except RewardError as error:
                return [error] * len(batch)

        rewards = [reward for reward, _ in self._parts]
        if len(rewards) == 1:
            return [compute(rewards[0])]
        with ThreadPoolExecutor(len(rewards), thread_name_prefix="oarsmith-rewards") as pool:
            waiting = {reward.name: pool.submit(compute, reward) for reward in rewards if reward.waits}
            here = {reward.name: compute(reward) for reward in rewards if not reward.waits}
            return [here[name] if name in here else waiting[name].result() for name in self.names]


def make_reward(given: Mapping[str, Any], *, tokenizer: Tokenizer | None = None) -> tuple[Reward, RewardOptions]:
    """One reward and its options; see `Rewards.from_settings`."""
    source = given.get("reward")
    if not isinstance(source, str) or not source:
        raise ConfigError(f"{dict(given)} names no reward", where="rewards", fix='write {"reward": "maths", ...}')
    if source in BUILT_IN:
        kind, make = BUILT_IN[source]
        options = read_options(kind, given)
        return make(options), options
    if source.startswith(("http://", "https://")):
        server = read_options(ServerOptions, given)
        return ServerReward(server), server
    if is_model(source):
        model = read_options(ModelOptions, given)
        return ModelReward(model, policy=tokenizer), model
    if ":" in source:
        function = read_options(FunctionOptions, given)
        return FunctionReward.from_options(function), function
    near = difflib.get_close_matches(source, BUILT_IN, n=1)
    fix = f"did you mean '{near[0]}'? " if near else ""
    fix += f"Rewards are {', '.join(BUILT_IN)}, file.py:function, package.module:function, http://..., or a directory"
    raise ConfigError(f"there is no reward '{source}'", where="rewards", fix=fix)


def _weighted(values: Sequence[Value], weights: Sequence[float]) -> Value:
    known = [value * weight for value, weight in zip(values, weights, strict=True) if value is not None]
    return sum(known) if known else None
