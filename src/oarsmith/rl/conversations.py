"""Environments as what speaks between a model's turns in a rollout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from oarsmith.errors import DataError
from oarsmith.rl.environments.environment import Environment, Message
from oarsmith.rl.environments.episode import Episode, EpisodeLimits
from oarsmith.rl.environments.suffix import SuffixEncoder
from oarsmith.rl.prompts import Asked


class EpisodeConversation:
    """One answer's environment."""

    def __init__(self, episode: Episode) -> None:
        self._episode = episode

    def continue_with(self, written: Sequence[int], *, truncated: bool) -> Sequence[int] | None:
        return self._episode.after(written, truncated=truncated)

    @property
    def reward(self) -> float | None:
        """The sum of what its turns were worth."""
        return self._episode.reward

    @property
    def cut(self) -> bool:
        """Whether a limit ended it."""
        return self._episode.over in ("turns", "length", "truncated")


@dataclass(frozen=True, kw_only=True)
class Episodes:
    """An environment of its own for every answer."""

    factory: Callable[[], Environment]
    encoder: SuffixEncoder
    limits: EpisodeLimits

    def first(self, row: dict[str, object], messages: Sequence[Message]) -> list[int]:
        """The ids of the prompt that an environment makes of a row."""
        return Episode(self.factory(), self.encoder, self.limits).begin(row, messages)

    def begin(self, asked: Asked) -> EpisodeConversation:
        """Raises:
        DataError: it begins with another prompt than it did for this row before: a group shares its prompt.
        """
        episode = Episode(self.factory(), self.encoder, self.limits)
        if tuple(episode.begin(asked.row, [dict(message) for message in asked.messages])) != asked.ids:
            what = "the environment begins differently each time, and answers to a prompt are compared with one another"
            raise DataError(what, where=asked.where, fix="let reset follow from the row alone")
        return EpisodeConversation(episode)
