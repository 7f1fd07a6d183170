"""The factor on the loss that keeps fp16 gradients away from zero."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from oarsmith.errors import TrainingError


@dataclass(kw_only=True)
class LossScaler:
    """Dynamic loss scaling (Micikevicius et al. 2018, section 3.2).

    The scale doubles after ``growth_steps`` steps in a row without an overflow (1000, as in Paddle) and halves when a
    gradient overflows; that step is skipped.
    """

    scale: float = 32768.0
    growth_steps: int = 1000
    good_steps: int = 0

    def update(self, *, overflowed: bool) -> None:
        """Note how a step went.

        Raises:
            TrainingError: the scale has fallen below 1, so it is not the scale that overflows.
        """
        if overflowed:
            self.scale, self.good_steps = self.scale / 2, 0
        else:
            self.good_steps += 1
            if self.good_steps == self.growth_steps:
                self.scale, self.good_steps = self.scale * 2, 0
        if self.scale < 1:
            raise TrainingError(
                f"fp16 gradients overflow at any loss scale (now {self.scale:g})",
                where="dtype fp16",
                fix="train in bf16 or fp32, or lower learning_rate: the model diverges, or fp16's range is too small",
            )

    def state(self) -> dict[str, float]:
        """For a checkpoint, as plain JSON."""
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load_state(self, state: Mapping[str, float]) -> None:
        """Restore what :meth:`state` gave."""
        self.scale, self.good_steps = state["scale"], int(state["good_steps"])
