"""What a method's data is, once it has been read: the contract between methods and the training job."""

from __future__ import annotations

from dataclasses import dataclass

from oarsmith.training.batches import BatchSet, BatchSource


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """What a run trains, evaluates and is finally tested on, and the account of where it came from.

    Attributes:
        reports: the account as JSON, by part (``train``, ``eval``, ``test``); ``lines``: as a person reads it.
        highest_id: the largest token id, and where it stands.
    """

    train: BatchSource
    evaluation: BatchSet | None
    test: BatchSet | None
    reports: dict[str, object]
    lines: list[str]
    highest_id: tuple[int, str]
