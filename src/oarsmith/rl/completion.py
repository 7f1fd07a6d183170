"""What a model wrote to a prompt, and what it is worth: the border between rollouts and rewards."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

import numpy as np
import numpy.typing as npt

_NOTHING: Mapping[str, object] = MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class Completion:
    """One answer to a prompt, as rewards see it.

    ``prompt`` is the text that the model was given (rendered with its chat template, if it has one), ``text`` all that
    followed: with an environment also what it appended. ``token_ids`` are the tokens of ``text`` as they were sampled,
    the end token included; ``own`` says for each whether the model wrote it (empty: all of them). ``row`` is the row of
    the data set that the prompt came from: answers, test cases, schemas. ``truncated`` is true where the length limit
    ended the answer. ``step`` counts the updates of the run so far, for rewards that change with progress.
    """

    prompt: str
    text: str
    token_ids: tuple[int, ...]
    row: Mapping[str, object] = dataclasses.field(default_factory=lambda: _NOTHING)
    truncated: bool = False
    own: tuple[bool, ...] = ()
    step: int = 0

    def __post_init__(self) -> None:
        assert not self.own or len(self.own) == len(self.token_ids), (len(self.own), len(self.token_ids))


@dataclasses.dataclass(frozen=True)
class Scores:
    """Rewards of some completions, in their order. None: no score; such a completion is left out of its group's
    baseline.

    ``total`` is what the model learns from (all parts, weighted); ``parts`` each reward function's own values by its
    name.
    """

    total: list[float | None]
    parts: dict[str, list[float | None]]

    def __post_init__(self) -> None:
        for name, values in self.parts.items():
            assert len(values) == len(self.total), (name, len(values), len(self.total))

    @property
    def rewards(self) -> npt.NDArray[np.float64]:
        """``total`` as numbers; nan: no score."""
        return np.array([np.nan if value is None else value for value in self.total], dtype=np.float64)


class Scorer(Protocol):
    """Whatever scores completions: the configured rewards of a run, a reward model, a test's own function."""

    def score(self, batch: Sequence[Completion]) -> Scores:
        """The rewards of ``batch``, one a completion, in its order."""
        ...
