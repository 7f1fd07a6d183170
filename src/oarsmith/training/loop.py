"""The training loop, one for every method: asks for batches, runs updates, logs, evaluates, saves, stops, resumes."""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from oarsmith.data.batch import Batch
from oarsmith.data.loader import Loader
from oarsmith.errors import StoppedError, TrainingError
from oarsmith.models.decoder import Decoder
from oarsmith.training.checkpoint import CheckpointStore, read_checkpoint
from oarsmith.training.evaluate import Evaluation
from oarsmith.training.forensics import Decode, save_failure
from oarsmith.training.log import RunLog, peak_memory_mb
from oarsmith.training.objective import Objective
from oarsmith.training.optimizer import AdamW
from oarsmith.training.progress import Progress
from oarsmith.training.schedule import Schedule
from oarsmith.training.step import NonFiniteError, StepResult, run_step, seed_step
from oarsmith.training.trackers import Tracker

When = Literal["no", "steps", "epoch"]


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """When to do what. ``total_steps`` counts updates; ``best_metric`` is a key of the evaluation record."""

    seed: int
    total_steps: int
    accumulate: int
    max_grad_norm: float
    log_steps: int
    eval_when: When = "no"
    eval_steps: int = 0
    save_when: When = "steps"
    save_steps: int = 500
    best_metric: str = "eval_loss"
    greater_is_better: bool = False


@dataclass
class RunState:
    """All that changes while training, beside weights, optimizer and the loader's place."""

    step: int = 0
    tokens: int = 0
    trained: float = 0.0
    window_total: float = 0.0
    window_count: float = 0.0
    window_correct: float = 0.0
    best_value: float | None = None
    best_step: int | None = None


@dataclass(frozen=True, kw_only=True)
class Loop:
    """The parts, finished; :meth:`run` is the procedure.

    Attributes:
        write_model: writes the model or adapter of a checkpoint into a directory.
        load_model: restores what ``write_model`` wrote.
        evaluate: scores the model on held-out data; None without such data.
        decode: ids to text, for the record of a failed step.
    """

    model: Decoder
    objective: Objective
    loader: Loader
    optimizer: AdamW
    schedule: Schedule
    settings: LoopSettings
    output_dir: Path
    store: CheckpointStore
    log: RunLog
    tracker: Tracker
    progress: Progress
    write_model: Callable[[Path], None]
    load_model: Callable[[Path], None]
    evaluate: Callable[[], Evaluation] | None
    decode: Decode

    def run(self, resume: Path | None) -> RunState:
        """Train from the start or from a checkpoint to ``total_steps``.

        Raises:
            TrainingError: a loss or gradient that is not finite (the batch is kept).
            StoppedError: the process was asked to end (SIGTERM); everything is saved.
        """
        state = RunState() if resume is None else self._restore(resume)
        self.log.rewind(state.step)
        self.model.train()
        self.progress.start(state.step, self.settings.total_steps)
        clock = _Clock(state.tokens)
        with _stop_signals() as stop:
            while state.step < self.settings.total_steps:
                epoch_end = self._one_step(state)
                last = state.step == self.settings.total_steps
                self._report(state, clock, last)
                # Looked at once: a signal that comes after this is for the next step, or nothing would be saved for it.
                stopping = bool(stop) and not last
                saving = self._save_due(state, epoch_end, last, stopping)
                self._evaluate_if_due(state, epoch_end, last, saving)
                if saving:
                    self._save(state)
                if stopping:
                    raise StoppedError(
                        f"saved at step {state.step} of {self.settings.total_steps} when asked to end",
                        where=str(self.output_dir),
                        fix="run the same command again to continue",
                    )
        self.progress.stop()
        return state

    def _one_step(self, state: RunState) -> bool:
        """One update; True when it was the last of its epoch."""
        epoch = self.loader.state()["epoch"]
        batches = list(itertools.islice(self.loader, self.settings.accumulate))
        lr = self.schedule(state.step)
        seed_step(self.settings.seed, "step", state.step)
        try:
            result = run_step(
                self.model,
                self.objective,
                batches,
                self.optimizer,
                lr=lr,
                max_grad_norm=self.settings.max_grad_norm,
            )
        except NonFiniteError as error:
            raise self._failed(state.step + 1, error, batches) from error
        state.step += 1
        state.tokens += result.num_tokens
        state.trained += result.count
        state.window_total += result.total
        state.window_count += result.count
        state.window_correct += result.sums.get("accuracy", 0.0)
        self.progress.step(state.step, result.total / result.count, result.num_tokens)
        self._log_if_due(state, result, lr)
        return bool(self.loader.state()["epoch"] != epoch)

    def _log_if_due(self, state: RunState, result: StepResult, lr: float) -> None:
        if state.step % self.settings.log_steps and state.step not in (1, self.settings.total_steps):
            return
        place = self.loader.state()
        record = {
            "step": state.step,
            "epoch": place["epoch"] + place["position"] / self.loader.batches_per_epoch(place["epoch"]),
            "loss": state.window_total / state.window_count,
            "accuracy": state.window_correct / state.window_count,
            "grad_norm": result.grad_norm,
            "learning_rate": lr,
            "tokens": state.tokens,
            "trained_tokens": state.trained,
        }
        state.window_total = state.window_count = state.window_correct = 0.0
        self.log.append(record)
        self.tracker.log(record)

    def _report(self, state: RunState, clock: _Clock, last: bool) -> None:
        if state.step % self.settings.log_steps and not last:
            return
        speed = clock.lap(state.tokens)
        timing = {"step": state.step, "tokens_per_second": speed, "peak_memory_mb": peak_memory_mb()}
        self.log.append_timing(timing)
        self.tracker.log(timing)

    def _evaluate_if_due(self, state: RunState, epoch_end: bool, last: bool, saving: bool) -> None:
        due = _due(self.settings.eval_when, self.settings.eval_steps, state.step, epoch_end)
        if self.evaluate is None or not (due or (last and self.settings.eval_when != "no")):
            return
        record = self.evaluate().record()
        value = record[self.settings.best_metric]
        better = state.best_value is None or (
            value > state.best_value if self.settings.greater_is_better else value < state.best_value
        )
        if better and saving:  # what is not kept cannot be returned to
            state.best_value, state.best_step = value, state.step
        self.log.append({"step": state.step, **record})
        self.tracker.log({"step": state.step, **record})
        mark = " (best checkpoint so far)" if better and saving else ""
        self.progress.message(
            f"step {state.step}: eval loss {record['eval_loss']:.4f}, perplexity {record['eval_perplexity']:.2f}, "
            f"token accuracy {record['eval_accuracy']:.1%}{mark}"
        )

    def _save_due(self, state: RunState, epoch_end: bool, last: bool, stopping: bool) -> bool:
        if self.settings.save_when == "no":
            return stopping
        return last or stopping or _due(self.settings.save_when, self.settings.save_steps, state.step, epoch_end)

    def _save(self, state: RunState) -> None:
        saved = {"run": asdict(state), "loader": self.loader.state(), "optimizer_steps": self.optimizer.step_count}
        self.store.save(state.step, self.write_model, self.optimizer.state_tensors(), saved)
        self.store.prune(state.best_step)

    def _restore(self, checkpoint: Path) -> RunState:
        tensors, saved = read_checkpoint(checkpoint)
        self.load_model(checkpoint)
        self.optimizer.load_state(tensors, saved["optimizer_steps"])
        self.loader.load_state(saved["loader"])
        state = RunState(**saved["run"])
        self.progress.message(f"resuming from {checkpoint} at step {state.step} of {self.settings.total_steps}")
        return state

    def _failed(self, step: int, error: NonFiniteError, batches: Sequence[Batch]) -> TrainingError:
        kept = save_failure(self.output_dir, step, error.what, batches, self.model, self.decode)
        return TrainingError(
            f"{error.what} at step {step}; the step was not applied",
            where=str(kept),
            fix="look at documents.jsonl there; lower learning_rate, or repair the rows it names",
        )


def _due(when: When, every: int, step: int, epoch_end: bool) -> bool:
    return (when == "steps" and step % every == 0) or (when == "epoch" and epoch_end)


class _Clock:
    """Tokens per second since the last lap."""

    def __init__(self, tokens: int) -> None:
        self._tokens, self._time = tokens, time.perf_counter()

    def lap(self, tokens: int) -> float:
        now = time.perf_counter()
        speed = (tokens - self._tokens) / max(now - self._time, 1e-9)
        self._tokens, self._time = tokens, now
        return speed


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collects SIGTERM instead of dying: the loop looks at the list between steps. A second one ends at once."""
    received: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    before: Any = signal.signal(signal.SIGTERM, note)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)
