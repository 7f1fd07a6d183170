"""What a reward is, how its values are checked, and how a place in a batch is named."""

from __future__ import annotations

import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from oarsmith.errors import TrainingError
from oarsmith.rl.completion import Completion
from oarsmith.rl.rewards.watch import Watch

Value = float | None
"""A reward; None: there is none, and the answer is left out of its group's baseline."""

_SHOWN = 60


class RewardError(TrainingError):
    """A reward that could not be computed, or that is no number. Names the reward and the row."""


class Reward(ABC):
    """One reward of answers.

    Attributes:
        name: by which reports and errors call it.
        waits: whether it mostly waits for something else (a server, other processes, a function with a time limit), so
            that it runs on a thread of its own while others compute.
        failures, last_failure: answers that it gave a value in place of a score, by its own rule, and why.
    """

    def __init__(self, name: str, *, waits: bool = False) -> None:
        self.name, self.waits = name, waits
        self.failures, self.last_failure = 0, ""

    @abstractmethod
    def values(self, batch: Sequence[Completion], watch: Watch) -> list[Value | RewardError]:
        """The reward of each answer in order, or why there is none.

        Raises:
            RewardError: what concerns no single answer: a server that does not reply, a time limit.
        """

    def close(self) -> None:  # noqa: B027  most hold nothing
        """Give back what it holds."""


def place(batch: Sequence[Completion], index: int) -> str:
    """An answer of a batch, for errors: number, step, and the end of its prompt."""
    one = batch[index]
    prompt = one.prompt if len(one.prompt) <= _SHOWN else "..." + one.prompt[-_SHOWN:]
    return f"answer {index + 1} of {len(batch)} at step {one.step}, prompt {prompt!r}"


def checked(value: object, *, name: str, where: str) -> Value | RewardError:
    """A value that a reward returned, as a finite float or None; anything else as an error."""
    if value is None:
        return None
    if not isinstance(value, numbers.Real | np.bool_):
        shown = repr(value)
        what = f"reward '{name}' returned {shown[:_SHOWN]}, a {type(value).__name__}"
        return RewardError(what, where=where, fix="return a number, or None for no score")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        return RewardError(f"reward '{name}' returned {number}", where=where, fix="return a finite number or None")
    return number


def same_length(values: object, batch: Sequence[Completion], name: str) -> Sequence[object]:
    """What a function of many answers returned, if it is a list with a value for each.

    Raises:
        RewardError: it is not.
    """
    if isinstance(values, np.ndarray) and values.ndim == 1:
        values = values.tolist()
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        what = f"reward '{name}' returned a {type(values).__name__}"
        raise RewardError(what, fix="a function of prompts and completions returns a list, a number or None for each")
    if len(values) != len(batch):
        what = f"reward '{name}' returned {len(values)} values for {len(batch)} answers"
        raise RewardError(what, fix="return one value for each answer, in order")
    return values
