"""What the loop asks of a method's loss."""

from __future__ import annotations

from collections.abc import Mapping
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
