"""What a method's data is, once it has been read: the contract between methods and the training job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from oarsmith.data.loader import Loader
from oarsmith.data.rows import Row
from oarsmith.errors import DataError
from oarsmith.training.batches import BatchSet, BatchSource

R = TypeVar("R", bound=Row)


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """What a run trains, evaluates and is finally tested on, and the account of where it came from.

    Attributes:
        reports: the account as JSON, by part (``train``, ``eval``, ``test``); ``lines``: as a person reads it.
        highest_id: the largest token id, and where it stands.
        answers_evaluated: evaluations look at answers alone, and ``evaluation`` is None.
    """

    train: BatchSource
    evaluation: BatchSet | None
    test: BatchSet | None
    reports: dict[str, object]
    lines: list[str]
    highest_id: tuple[int, str]
    answers_evaluated: bool = False


def hold_out(samples: Sequence[R], ratio: float, seed: int) -> tuple[tuple[R, ...], tuple[R, ...]]:
    """What remains and what is held out, by rows of the data: samples of one row never end up on both sides.

    Raises:
        DataError: nothing would remain.
    """
    rows = sorted({sample.where for sample in samples})
    count = max(1, round(len(rows) * ratio))
    if count >= len(rows):
        raise DataError(f"eval_split_ratio {ratio} leaves nothing of {len(rows)} rows to train on")
    draws = np.random.Philox(np.random.SeedSequence([seed, 0xE7A1])).random_raw(len(rows))
    chosen = {rows[index] for index in np.argsort(draws, kind="stable")[:count]}
    return (
        tuple(sample for sample in samples if sample.where not in chosen),
        tuple(sample for sample in samples if sample.where in chosen),
    )


def first_batches(loader: Loader, limit: int) -> BatchSet:
    """The batches of the loader's first epoch, at most ``limit`` of them (-1: all)."""
    count = loader.batches_per_epoch(0)
    shown = range(count if limit < 0 else min(limit, count))
    return lambda: (loader.batch_at(0, index) for index in shown)
