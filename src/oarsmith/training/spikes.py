"""Is a loss out of line with those before it?"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from statistics import median

# Steps before anything is judged: at the start the loss falls fast and the median lags behind.
_WARMUP = 20
# A loss this many robust deviations above the median is beyond what batches of different rows do.
_DEVIATIONS = 6.0
# Makes the median absolute deviation of a normal distribution its standard deviation.
_MAD_TO_STD = 1.4826


class SpikeDetector:
    """A loss is a spike if it is more than ``factor`` times the median of the ``window`` steps before it, and also far
    outside their scatter: more than six robust deviations (from the median absolute deviation) above that median.

    What it knows are the losses themselves, so a resumed run that restores :meth:`state` judges the same.

    Args:
        factor: 0: nothing is a spike.
    """

    def __init__(self, factor: float, window: int = 64) -> None:
        assert factor >= 0 and window >= _WARMUP, (factor, window)
        self._factor = factor
        self._losses: deque[float] = deque(maxlen=window)

    def check(self, loss: float) -> str | None:
        """What is odd about the mean loss of a step, or None; it then belongs to the steps before the next one."""
        before = list(self._losses)
        self._losses.append(loss)
        if self._factor == 0 or len(before) < _WARMUP:
            return None
        middle = median(before)
        scatter = _MAD_TO_STD * median(abs(value - middle) for value in before)
        limit = max(self._factor * middle, middle + _DEVIATIONS * scatter)
        if math.isfinite(loss) and loss <= limit:
            return None
        times = loss / middle if middle > 0 else math.inf
        return f"the loss is {loss:.4g}, {times:.3g} times the median {middle:.4g} of the {len(before)} steps before"

    def state(self) -> list[float]:
        """All it remembers, as JSON."""
        return list(self._losses)

    def load_state(self, losses: Sequence[float]) -> None:
        """Take back what :meth:`state` gave."""
        self._losses.clear()
        self._losses.extend(losses)
