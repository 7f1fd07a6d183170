"""Learning rate as a pure function of the update's index."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

ScheduleKind = Literal["linear", "cosine", "constant", "constant_with_warmup"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warmup from 0 to ``peak`` in ``warmup_steps`` updates, then decay to ``floor`` at ``total_steps``.

    Update ``index`` counts from 0 and follows transformers' get_*_schedule: the first update after the warmup has the
    peak rate, an update at ``total_steps`` would have the floor.
    """

    kind: ScheduleKind
    peak: float
    total_steps: int
    warmup_steps: int = 0
    floor: float = 0.0

    def __call__(self, index: int) -> float:
        if index < self.warmup_steps:
            return self.peak * index / max(1, self.warmup_steps)
        if self.kind in ("constant", "constant_with_warmup"):
            return self.peak
        done = (index - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        done = min(1.0, done)
        left = 1.0 - done if self.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        return self.floor + (self.peak - self.floor) * left
