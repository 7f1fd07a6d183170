"""Prompts with random answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from oarsmith.data.answers import Answered


def random_answers(
    count: int, *, seed: int = 0, labels: tuple[float, ...] = (1.0, 0.0), reference: float | None = -60.0
) -> list[Answered]:
    """Rows with an answer for each label, of 1 to 12 tokens; reference log-probabilities around ``reference``."""
    draw = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        ids = [draw.integers(0, 1120, size=draw.integers(1, 13)).astype(np.int32) for _ in (0, *labels)]
        known = () if reference is None else tuple(draw.normal(reference, 8.0, size=len(labels)).tolist())
        margin = float(draw.random())
        rows.append(Answered(ids[0], tuple(ids[1:]), labels, f"made:{number}", margin=margin, reference=known))
    return rows


def relabelled(rows: Sequence[Answered], labels: Sequence[tuple[float, ...]]) -> list[Answered]:
    """The rows with other labels."""
    return [replace(row, labels=of) for row, of in zip(rows, labels, strict=True)]
