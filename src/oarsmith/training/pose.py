"""A batch source whose documents' positions skip."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from oarsmith.data.batch import Batch
from oarsmith.data.pose import Pose
from oarsmith.errors import ConfigError
from oarsmith.training.batches import BatchSource


class PosedBatches:
    """Another source's batches under PoSE. Its place is the other's: a resumed run draws the same skips."""

    def __init__(self, source: BatchSource, pose: Pose) -> None:
        self._source = source
        self._pose = pose

    def batches_per_epoch(self, epoch: int) -> int:
        return self._source.batches_per_epoch(epoch)

    def __iter__(self) -> Iterator[Batch]:
        place = self._source.state()
        epoch, first = place["epoch"], place["position"]
        for index, batch in enumerate(self._source, first):
            yield self._pose.apply(batch, epoch=epoch, index=index)

    def state(self) -> dict[str, Any]:
        """The other's place, and what the skips depend on."""
        return {**self._source.state(), "pose_positions": self._pose.num_positions}

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes to a saved place.

        Raises:
            ConfigError: the state belongs to positions over another context.
        """
        then, now = state.get("pose_positions"), self._pose.num_positions
        if then != now:
            raise ConfigError(
                f"positions skip within {now}, but the checkpoint's run had {then or 'none that skip'}",
                where="use_pose_convert",
                fix="resume with the same rope_scaling_factor and use_pose_convert, or start a new run",
            )
        self._source.load_state(state)
