"""Batches epoch after epoch, and a place among them that is two numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from oarsmith.data.batch import Batch
from oarsmith.data.order import require_same_plan
from oarsmith.errors import DataError


class PlacedBatches(ABC):
    """What the loaders share: going from batch to batch, and a place that can be saved.

    Args:
        fingerprint: of the data; a saved place is refused over other data.
    """

    def __init__(self, fingerprint: str) -> None:
        self._fingerprint = fingerprint
        self._epoch = 0
        self._position = 0

    @abstractmethod
    def batches_per_epoch(self, epoch: int) -> int:
        """Number of batches of an epoch."""

    @abstractmethod
    def batch_at(self, epoch: int, index: int) -> Batch:
        """Batch `index` of an epoch; a pure function of the arguments."""

    @abstractmethod
    def _settings(self) -> dict[str, Any]:
        """What the plan depends on beside the data."""

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the present place to the end of its epoch; the place moves on before a batch is handed out."""
        epoch = self._epoch
        while self._epoch == epoch:
            batch = self.batch_at(epoch, self._position)
            self._position += 1
            if self._position == self.batches_per_epoch(epoch):
                self._epoch, self._position = epoch + 1, 0
            yield batch

    def state(self) -> dict[str, Any]:
        """The place of the next batch, and what the plan depends on."""
        return {"epoch": self._epoch, "position": self._position, "fingerprint": self._fingerprint, **self._settings()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes to a saved place.

        Raises:
            DataError: the state belongs to other data.
            ConfigError: the state belongs to another plan of the same data.
        """
        require_same_plan(state, fingerprint=self._fingerprint, settings=self._settings())
        epoch, position = state["epoch"], state["position"]
        if epoch < 0 or not 0 <= position < self.batches_per_epoch(epoch):
            what = f"the checkpoint's place (epoch {epoch}, batch {position}) is outside the data"
            raise DataError(what, fix="the checkpoint's state is damaged; resume from another one")
        self._epoch, self._position = epoch, position
