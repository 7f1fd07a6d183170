"""What the loop asks of a method's loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from oarsmith.data.batch import Batch
from oarsmith.models.decoder import Decoder


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One micro-batch under an objective.

    Attributes:
        loss: what backward starts from: the micro-batch's share of the step's mean loss (already scaled).
        total: the unscaled sum of the loss; ``count``: what it is a sum over.
        sums: further sums over the same count (``accuracy``), reported divided by it.
    """

    loss: Tensor
    total: float
    count: float
    sums: Mapping[str, float] = field(default_factory=dict)


class Objective(Protocol):
    """A pure function of model and batch.

    ``scale`` is 1 / the count of the whole step, known before any forward, times the loss scale (fp16). The loss and
    its gradient are proportional to it.
    """

    def __call__(self, model: Decoder, batch: Batch, scale: float) -> Outcome: ...


class StepObjective(ABC):
    """An objective in which the micro-batches of a step depend on each other, or a step on those before it.

    ``of_step`` sees all batches of a step before the first gradient: means and orders over the whole step are then the
    same however it is split.
    """

    @abstractmethod
    def of_step(self, model: Decoder, batches: Sequence[Batch]) -> Objective:
        """The objective for these batches, which are one step; nothing here changes."""

    def __call__(self, model: Decoder, batch: Batch, scale: float) -> Outcome:
        """A step of one batch."""
        return self.of_step(model, (batch,))(model, batch, scale)

    def note(self, sums: Mapping[str, float], count: float) -> None:  # noqa: B027  (most have nothing to remember)
        """Take in the sums of a step that has been applied."""

    def state(self) -> dict[str, float]:
        """What a resume needs."""
        return {}

    def load_state(self, state: Mapping[str, float]) -> None:
        """Go on from a saved state."""
        assert not state, state


def objective_of_step(objective: Objective, model: Decoder, batches: Sequence[Batch]) -> Objective:
    """What the micro-batches of a step go through."""
    return objective.of_step(model, batches) if isinstance(objective, StepObjective) else objective
