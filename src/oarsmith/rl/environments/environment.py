"""What an environment is: it sees what the model wrote and says what follows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from oarsmith.errors import ConfigError, TrainingError
from oarsmith.rl.rewards.locate import find_function

Message = dict[str, Any]


class EpisodeError(TrainingError):
    """An environment that failed, or whose turn cannot be appended."""


@dataclass(frozen=True)
class Turn:
    """What follows a text of the model.

    Attributes:
        messages: what is appended, as messages that the chat template renders (role ``user`` or ``tool``).
        text: or text that is appended as it is, behind what the model wrote. One of both.
        done: the conversation is over, and nothing is appended.
        reward: what this turn was worth; rewards of all turns are added. None: nothing.
        calls: calls that the model's text was read as, which templates with tools render beside it.
    """

    messages: tuple[Message, ...] = ()
    text: str = ""
    done: bool = False
    reward: float | None = None
    calls: tuple[Message, ...] = ()

    def __post_init__(self) -> None:
        if self.done and (self.messages or self.text):
            raise EpisodeError("a turn that is done appends nothing", fix="return Turn(done=True, reward=...)")
        if not self.done and bool(self.messages) == bool(self.text):
            raise EpisodeError(
                "a turn that goes on has either messages or text",
                fix='return Turn(messages=({"role": "user", "content": ...},)), or done=True',
            )


class Environment(Protocol):
    """One conversation. A new one is made for each answer, so that it may keep what it likes on itself."""

    def reset(self, row: Mapping[str, object]) -> list[Message] | None:
        """Begin with a row of the data.

        Returns:
            The first messages; None: the row's own.
        """
        ...

    def step(self, completion: str) -> Turn:
        """What follows ``completion``, which the model wrote since the last turn (without special tokens that end
        it)."""
        ...


Factory = Callable[[], Environment]


def find_environment(name: str) -> Factory:
    """A class or function without arguments that makes an environment: ``file.py:Name`` or ``package.module:Name``.

    Raises:
        ConfigError: there is none, or what it makes has no ``reset`` or ``step``.
    """
    made = find_function(name)
    try:
        found = made()
    except TypeError as error:
        what = f"'{name}' cannot be made without arguments: {error}"
        raise ConfigError(what, where="environment", fix="give its arguments defaults") from error
    missing = [part for part in ("reset", "step") if part not in dir(found)]
    if missing:
        raise ConfigError(f"what '{name}' makes has no {missing[0]}", where="environment", fix="give it reset and step")
    return made
