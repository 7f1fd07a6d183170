"""Learning rate as a pure function of the update's index."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from oarsmith.errors import ConfigError

ScheduleKind = Literal["linear", "cosine", "polynomial", "constant", "constant_with_warmup", "wsd"]
DecayStyle = Literal["linear", "cosine", "minus_sqrt", "exponential"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warmup from 0 to ``peak`` in ``warmup_steps`` updates, then a fall to ``floor``, where the rate stays.

    Update ``index`` counts from 0 and follows transformers' get_*_schedule: the first update after the warmup has the
    peak rate, an update at the end of the fall would have the floor.

    Attributes:
        decay_steps: the update at which the fall ends, the warmup counted in; None: ``total_steps``.
        num_cycles: cosine: waves until then; 0.5 is one fall.
        power: polynomial: the exponent.
        wsd_decay_steps: wsd (warmup, stable, decay): length of the fall at the end; None: a tenth of all steps.
        wsd_style: its shape, as Megatron-core names them.

    Raises:
        ConfigError: the phases do not fit before the end.
    """

    kind: ScheduleKind
    peak: float
    total_steps: int
    warmup_steps: int = 0
    floor: float = 0.0
    decay_steps: int | None = None
    num_cycles: float = 0.5
    power: float = 1.0
    wsd_decay_steps: int | None = None
    wsd_style: DecayStyle = "minus_sqrt"

    def __post_init__(self) -> None:
        if self.decay_steps is not None and self.decay_steps <= self.warmup_steps:
            raise ConfigError(
                f"the learning rate reaches its floor at step {self.decay_steps}, but the warmup takes "
                f"{self.warmup_steps} steps",
                where="decay_steps",
                fix="raise decay_steps, or lower warmup_steps or warmup_ratio",
            )
        if self.kind == "wsd" and self._fall_start < self.warmup_steps < self._end:
            raise ConfigError(
                f"warmup ({self.warmup_steps} steps) and fall ({self._end - self._fall_start} steps) together are "
                f"longer than {self._end} steps",
                where="wsd_decay_steps",
                fix="lower wsd_decay_steps, warmup_steps or warmup_ratio",
            )

    def __call__(self, index: int) -> float:
        if index < self.warmup_steps:
            return self.peak * index / max(1, self.warmup_steps)
        if self.kind in ("constant", "constant_with_warmup"):
            return self.peak
        if index >= self._end:
            return self.floor
        return self.floor + (self.peak - self.floor) * self._left(index)

    @property
    def _end(self) -> int:
        return self.total_steps if self.decay_steps is None else self.decay_steps

    @property
    def _fall_start(self) -> int:
        """The first update of wsd's fall, which still has the peak rate."""
        return self._end - (self.wsd_decay_steps or max(1, self.total_steps // 10))

    def _left(self, index: int) -> float:
        """How much of the way from floor to peak is left, before the end."""
        if self.kind == "wsd":
            start = max(self._fall_start, self.warmup_steps)
            return 1.0 if index < start else _wsd_left((index - start) / (self._end - start), self.wsd_style)
        done = (index - self.warmup_steps) / max(1, self._end - self.warmup_steps)
        if self.kind == "cosine":
            return max(0.0, 0.5 * (1.0 + math.cos(math.pi * self.num_cycles * 2.0 * done)))
        return (1.0 - done) ** self.power if self.kind == "polynomial" else 1.0 - done


def _wsd_left(done: float, style: DecayStyle) -> float:
    match style:
        case "linear":
            return 1.0 - done
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * done))
        case "minus_sqrt":
            return 1.0 - math.sqrt(done)
        case "exponential":
            return 2.0 * 0.5**done - 1.0
