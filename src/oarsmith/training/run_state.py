"""When the loop does what, and all that changes while it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from oarsmith.training.step import StepResult

When = Literal["no", "steps", "epoch"]


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """When to do what. ``total_steps`` counts updates; ``best_metric`` is a key of the evaluation record.

    Attributes:
        in_backward: update each parameter during the backward pass (one pass a step, no clipping).
        patience: evaluations in a row that are not better by ``threshold`` before the run ends; 0: it never does.
        save_optimizer: whether checkpoints hold what an exact resume needs.
        load_optimizer, load_place: whether a resume restores the optimizer's state, and the place in the data.
    """

    seed: int
    total_steps: int
    accumulate: int
    max_grad_norm: float
    log_steps: int
    in_backward: bool = False
    eval_when: When = "no"
    eval_steps: int = 0
    save_when: When = "steps"
    save_steps: int = 500
    best_metric: str = "eval_loss"
    greater_is_better: bool = False
    patience: int = 0
    threshold: float = 0.0
    save_optimizer: bool = True
    load_optimizer: bool = True
    load_place: bool = True

    def due(self, when: When, every: int, step: int, epoch_end: bool) -> bool:
        """Whether something that happens ``when`` happens after this step."""
        return (when == "steps" and step % every == 0) or (when == "epoch" and epoch_end)

    def better(self, value: float, than: float | None, by: float = 0.0) -> bool:
        """Whether an evaluation beats another one (any beats none) by more than ``by``."""
        if than is None:
            return True
        return value > than + by if self.greater_is_better else value < than - by


@dataclass
class RunState:
    """All that changes while training, beside weights, optimizer and the loader's place.

    ``best_value`` is of the checkpoints that are kept, ``watched_value`` of all evaluations.
    """

    step: int = 0
    tokens: int = 0
    trained: float = 0.0
    window_total: float = 0.0
    window_count: float = 0.0
    window_sums: dict[str, float] = field(default_factory=dict)
    best_value: float | None = None
    best_step: int | None = None
    watched_value: float | None = None
    stalled: int = 0

    def note_step(self, result: StepResult) -> None:
        """Count an update; sums go into the window of the next line of the log."""
        self.step += 1
        self.tokens += result.num_tokens
        self.trained += result.count
        self.window_total += result.total
        self.window_count += result.count
        for name, value in result.sums.items():
            self.window_sums[name] = self.window_sums.get(name, 0.0) + value

    def take_means(self) -> dict[str, float]:
        """Mean loss and further sums since the last line of the log."""
        means = {"loss": self.window_total / self.window_count}
        means |= {name: value / self.window_count for name, value in self.window_sums.items()}
        self.window_total, self.window_count, self.window_sums = 0.0, 0.0, {}
        return means

    def note_evaluation(self, record: Mapping[str, float], settings: LoopSettings, *, kept: bool) -> bool:
        """Take in an evaluation of the present step; True where it is the best of the steps that are ``kept``."""
        value = record[settings.best_metric]
        best = kept and settings.better(value, self.best_value)
        if best:
            self.best_value, self.best_step = value, self.step
        if settings.better(value, self.watched_value, settings.threshold):
            self.watched_value, self.stalled = value, 0
        else:
            self.stalled += 1
        return best

    def given_up(self, settings: LoopSettings) -> bool:
        """Whether so many evaluations were no better that the run ends."""
        return 0 < settings.patience <= self.stalled
