"""The training loop, one for every method: asks for batches, runs updates, logs, evaluates, saves, stops, resumes."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor

from oarsmith.data.batch import Batch
from oarsmith.errors import StoppedError, TrainingError
from oarsmith.kernels.memory import FreedMemory
from oarsmith.models.decoder import Decoder
from oarsmith.training.batches import BatchSource, KeepingBatches
from oarsmith.training.checkpoint import read_checkpoint
from oarsmith.training.ema import Ema
from oarsmith.training.evaluate import in_words
from oarsmith.training.forensics import Recorder, StepFacts, WeightsAre
from oarsmith.training.log import RunLog
from oarsmith.training.objective import Objective, StepObjective
from oarsmith.training.optimizer import Optimizer
from oarsmith.training.progress import Progress
from oarsmith.training.ranks import ALONE, Ranks
from oarsmith.training.run_state import LoopSettings, RunState
from oarsmith.training.saver import Saver
from oarsmith.training.scaler import LossScaler
from oarsmith.training.schedule import Schedule
from oarsmith.training.speed import SpeedMeter
from oarsmith.training.spikes import SpikeDetector
from oarsmith.training.step import NonFiniteError, StepResult, run_step, run_step_in_backward, seed_step
from oarsmith.training.trackers import Tracker
from oarsmith.training.update_hooks import UpdateHooks


@dataclass(frozen=True, kw_only=True)
class Loop:
    """The parts, finished; :meth:`run` is the procedure.

    Attributes:
        load_model: restores what ``saver.write_model`` wrote.
        evaluate: scores the model on held-out data; None without such data.
        recorder: keeps steps that fail, in a run of one process; ``spikes`` says which other ones are odd.
        ema: averaged weights, which evaluations then use.
        scaler: for fp16.
        hooks: what the method does around the optimizer.
        ranks: the processes of the run; each has a loop of its own, and all loops do the same at the same time.
    """

    model: Decoder
    objective: Objective
    loader: BatchSource
    optimizer: Optimizer
    schedule: Schedule
    settings: LoopSettings
    output_dir: Path
    saver: Saver
    log: RunLog
    tracker: Tracker
    progress: Progress
    meter: SpeedMeter
    load_model: Callable[[Decoder, Path], None]
    evaluate: Callable[[], Mapping[str, float]] | None
    recorder: Recorder | None
    spikes: SpikeDetector
    memory: FreedMemory = field(default_factory=FreedMemory)
    ema: Ema | None = None
    scaler: LossScaler | None = None
    hooks: UpdateHooks = field(default_factory=UpdateHooks)
    ranks: Ranks = ALONE

    def run(self, resume: Path | None) -> RunState:
        """Train from the start or from a checkpoint to ``total_steps``, or until evaluations stop getting better.

        Raises:
            TrainingError: a loss or gradient that is not finite (the batch is kept).
            StoppedError: the process was asked to end (SIGTERM); everything is saved.
        """
        state = RunState() if resume is None else self._restore(resume)
        self.log.rewind(state.step)
        self.model.train()
        self.progress.start(state.step, self.settings.total_steps)
        with _stop_signals() as stop:
            while state.step < self.settings.total_steps and not state.given_up(self.settings):
                epoch_end = self._one_step(state)
                last = state.step == self.settings.total_steps
                # Looked at once: a signal that comes after this is for the next step, or nothing would be saved for it.
                stopping = self.ranks.any(bool(stop)) and not last
                planned = self._save_due(state, epoch_end, last)
                # What only a stop saves is no candidate for the best: without the stop it would not be there.
                self._evaluate_if_due(state, epoch_end, last, planned)
                given_up = state.given_up(self.settings) and self.settings.save_when != "no"
                if planned or stopping or given_up:
                    self._save(state)
                if stopping:
                    self.saver.finish()
                    raise StoppedError(
                        f"saved at step {state.step} of {self.settings.total_steps} when asked to end",
                        where=str(self.output_dir),
                        fix="run the same command again to continue",
                    )
        self.saver.finish()
        self.progress.stop()
        return state

    def return_to(self, step: int) -> None:
        """Take back the weights of a checkpoint, with their average and what the method keeps beside them."""
        path = self.saver.store.path(step)
        self.ranks.load_model(self.model, self.load_model, path)
        tensors, _ = read_checkpoint(path)
        if self.ema is not None:
            self.ema.load_state(self.ranks.own(_part(tensors, _EMA)))
        self.hooks.load_state(_part(tensors, _HOOKS))

    def evaluate_now(self, step: int) -> dict[str, float]:
        """An evaluation, logged."""
        assert self.evaluate is not None, "no data to evaluate on"
        with self.meter.paused(), nullcontext() if self.ema is None else self.ema.applied():
            record = {"step": step, **self.evaluate()}
        self.log.append(record)
        self.tracker.log(record)
        return record

    def _one_step(self, state: RunState) -> bool:
        """One update; True when it was the last of its epoch."""
        epoch = self.loader.state()["epoch"]
        batches = list(itertools.islice(self.loader, self.settings.accumulate))
        for batch in batches:
            self.meter.add(batch)
        lr = self.schedule(state.step)
        seed_step(self.settings.seed, "step", state.step)
        facts = StepFacts(
            step=state.step + 1,
            seed=self.settings.seed,
            learning_rate=lr,
            max_grad_norm=self.settings.max_grad_norm,
            loss_scale=1.0 if self.scaler is None else self.scaler.scale,
        )
        try:
            result = self._run_step(facts, batches)
        except NonFiniteError as error:
            raise self._failed(facts, error, batches) from error
        if self.ema is not None and not result.skipped:
            self.ema.update()
        self.memory.look()
        state.note_step(result)
        name, shown = headline(result)
        self.progress.step(state.step, shown, result.num_tokens, name=name)
        if result.skipped:
            self._event(state.step, "skipped", f"gradients overflowed at a loss scale of {result.loss_scale:g}")
        self._log_if_due(state, result, lr)
        return bool(self.loader.state()["epoch"] != epoch)

    def _run_step(self, facts: StepFacts, batches: Sequence[Batch]) -> StepResult:
        lr = facts.learning_rate
        if self.settings.in_backward:
            (batch,) = batches
            result = run_step_in_backward(self.model, self.objective, batch, self.optimizer, lr=lr)
            self._keep_if_odd(facts, batches, result, weights="after the update")
            return result
        return run_step(
            self.model,
            self.objective,
            batches,
            self.optimizer,
            lr=lr,
            max_grad_norm=facts.max_grad_norm,
            scaler=self.scaler,
            inspect=lambda result: self._keep_if_odd(facts, batches, result, weights="before the update"),
            hooks=self.hooks,
            number=facts.step,
            ranks=self.ranks,
        )

    def _keep_if_odd(
        self, facts: StepFacts, batches: Sequence[Batch], result: StepResult, *, weights: WeightsAre
    ) -> None:
        """Keep a step whose loss jumps; training goes on."""
        reason = self.spikes.check(result.total / result.count)
        if reason is not None:
            kept = None
            if self.recorder is not None:
                with self.meter.paused():
                    kept = self.recorder.spike(facts, reason, batches, result, weights=weights)
            self._event(facts.step, "spike", reason if kept is None else f"{reason}; kept in {kept.name}")

    def _event(self, step: int, event: str, detail: str) -> None:
        self.log.append({"step": step, "event": event, "detail": detail})
        self.progress.message(f"step {step}: {event}, {detail}")

    def _log_if_due(self, state: RunState, result: StepResult, lr: float) -> None:
        """A line of the log every ``log_steps``, and at the first and last step; speed with the regular ones."""
        due = state.step % self.settings.log_steps == 0 or state.step == self.settings.total_steps
        if not due and state.step > 1:
            return
        place = self.loader.state()
        record = {
            "step": state.step,
            "epoch": place["epoch"] + place["position"] / self.loader.batches_per_epoch(place["epoch"]),
            **state.take_means(),
            "grad_norm": None if result.skipped else result.grad_norm,
            "learning_rate": lr,
            "tokens": state.tokens,
            "trained_tokens": state.trained,
        }
        if self.scaler is not None:
            record["loss_scale"] = result.loss_scale
        self.log.append(record)
        self.tracker.log(record)
        if due:
            speed = self.meter.lap()
            self.log.append_timing({"step": state.step, **speed})
            self.tracker.log({"step": state.step, **speed})
            self.progress.report(state.step, loss=record[headline(result)[0]], learning_rate=lr, speed=speed)

    def _evaluate_if_due(self, state: RunState, epoch_end: bool, last: bool, saving: bool) -> None:
        due = self.settings.due(self.settings.eval_when, self.settings.eval_steps, state.step, epoch_end)
        if self.evaluate is None or not (due or (last and self.settings.eval_when != "no")):
            return
        record = self.evaluate_now(state.step)
        best = state.note_evaluation(record, self.settings, kept=saving)
        self.progress.message(_evaluation_line(record, best))
        if state.given_up(self.settings):
            self.progress.message(
                f"stopping early: {state.stalled} evaluations without a better {self.settings.best_metric} than "
                f"{state.watched_value:.4f}"
            )

    def _save_due(self, state: RunState, epoch_end: bool, last: bool) -> bool:
        when = self.settings.save_when
        return when != "no" and (last or self.settings.due(when, self.settings.save_steps, state.step, epoch_end))

    def _save(self, state: RunState) -> None:
        tensors = self.ranks.whole(self.optimizer.state_tensors()) if self.settings.save_optimizer else {}
        if self.ema is not None:
            averages = self.ranks.whole(self.ema.state_tensors())
            tensors |= {f"{_EMA}{name}": tensor for name, tensor in averages.items()}
        tensors |= {f"{_HOOKS}{name}": tensor for name, tensor in self.hooks.state_tensors().items()}
        if isinstance(self.loader, KeepingBatches):
            tensors |= {f"{_LOADER}{name}": tensor for name, tensor in self.loader.state_tensors().items()}
        saved = {
            "run": asdict(state),
            "loader": self.loader.state(),
            "optimizer_steps": self.optimizer.step_count,
            "has_optimizer": self.settings.save_optimizer,
            "spikes": self.spikes.state(),
            "batches_per_step": self.settings.accumulate,
        }
        if self.scaler is not None:
            saved["scaler"] = self.scaler.state()
        if isinstance(self.objective, StepObjective):
            saved["objective"] = self.objective.state()
        with self.meter.paused():
            model = self.ranks.whole_model(self.model)
            if model is not None:
                self.saver.save(state.step, model, tensors, saved, state.best_step)
            self.ranks.barrier()

    def _restore(self, checkpoint: Path) -> RunState:
        tensors, saved = read_checkpoint(checkpoint)
        self._same_step(saved, checkpoint)
        self.ranks.load_model(self.model, self.load_model, checkpoint)
        if self.settings.load_optimizer:
            if not saved.get("has_optimizer", True):
                raise TrainingError(
                    "this checkpoint was saved without the optimizer's state",
                    where=str(checkpoint),
                    fix="set ignore_load_lr_and_optim to true to go on with fresh states",
                )
            own = {name: tensor for name, tensor in tensors.items() if not name.startswith((_EMA, _HOOKS, _LOADER))}
            self.optimizer.load_state(self.ranks.own(own), saved["optimizer_steps"])
        else:
            self.optimizer.adopt_weights()
        if self.ema is not None:
            self.ema.load_state(self.ranks.own(_part(tensors, _EMA)))
        self.hooks.load_state(_part(tensors, _HOOKS))
        if self.settings.load_place:
            self.loader.load_state(saved["loader"])
            if isinstance(self.loader, KeepingBatches):
                self.loader.load_tensors(_part(tensors, _LOADER))
        self.spikes.load_state(saved.get("spikes", []))
        if self.scaler is not None and "scaler" in saved:
            self.scaler.load_state(saved["scaler"])
        if isinstance(self.objective, StepObjective):
            self.objective.load_state(saved.get("objective", {}))
        state = RunState(**saved["run"])
        self.progress.message(f"resuming from {checkpoint} at step {state.step} of {self.settings.total_steps}")
        return state

    def _same_step(self, saved: Mapping[str, Any], checkpoint: Path) -> None:
        """Refuse to go on with steps of another size in the middle of the data."""
        before, now = saved.get("batches_per_step", self.settings.accumulate), self.settings.accumulate
        if before != now and self.settings.load_place:
            raise TrainingError(
                f"a step had {before} batches, now it has {now} (gradient_accumulation_steps times the processes that "
                "share the data)",
                where=str(checkpoint),
                fix="set gradient_accumulation_steps so that the product is the same, or ignore_data_skip to true",
            )

    def _failed(self, facts: StepFacts, error: NonFiniteError, batches: Sequence[Batch]) -> TrainingError:
        partly = error.partly_updated
        if self.recorder is None:
            return TrainingError(
                f"{error.what} at step {facts.step}; the step was not applied",
                fix="run it from the last checkpoint in one process to see where it begins; then lower learning_rate, "
                "or repair the rows",
            )
        kept = self.recorder.failure(
            facts, error.what, batches, weights="partly updated" if partly else "before the update"
        )
        applied = "applied in part, so resume from the last checkpoint" if partly else "not applied"
        return TrainingError(
            f"{error.what} at step {facts.step}; the step was {applied}",
            where=str(kept),
            fix=f"oarsmith replay {kept} shows where it begins; then lower learning_rate, or repair the rows it names",
        )


def headline(result: StepResult) -> tuple[str, float]:
    """The number of a step that tells most: the reward where there is one, else the loss."""
    name = "reward" if "reward" in result.sums else "loss"
    return name, result.sums.get(name, result.total) / result.count


_EMA, _HOOKS, _LOADER = "ema/", "hooks/", "loader/"


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _evaluation_line(record: Mapping[str, float], best: bool) -> str:
    return f"step {record['step']}: eval {', '.join(in_words(record))}{' (best checkpoint so far)' if best else ''}"


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
