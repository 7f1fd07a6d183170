"""Experiment trackers beside the run's own log."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from oarsmith.errors import MissingExtraError


class Tracker(Protocol):
    """Gets every record of the log (a ``step`` and numbers)."""

    def log(self, record: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class NoTracker:
    def log(self, record: Mapping[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


class TensorBoard:
    """Scalars for TensorBoard under ``directory``."""

    def __init__(self, directory: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError("tensorboard", "train-trackers", "report_to tensorboard") from error
        self._writer = SummaryWriter(str(directory))

    def log(self, record: Mapping[str, Any]) -> None:
        for name, value in record.items():
            if name != "step":
                group = "eval" if name.startswith("eval_") else "train"
                self._writer.add_scalar(f"{group}/{name.removeprefix('eval_')}", value, record["step"])

    def close(self) -> None:
        self._writer.close()


def make_tracker(name: str, directory: Path) -> Tracker:
    """``none`` or ``tensorboard``."""
    return TensorBoard(directory) if name == "tensorboard" else NoTracker()
