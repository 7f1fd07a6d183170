"""What a person sees while training: a bar on a terminal; elsewhere a line for each line of the log."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from oarsmith.training.numbers import show_duration

# Seconds without a line, where the output is not a terminal, after which one says that the run is alive.
_SILENCE = 30.0


class Progress:
    """Step progress on a console. ``quiet`` prints nothing but messages."""

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self._console = console
        self._quiet = quiet
        self._bar: RichProgress | None = None
        self._first = self._total = self._tokens = 0
        self._begin = self._line = time.perf_counter()
        self._loss: float | None = None
        self._reported, self._name = "", "loss"

    def start(self, step: int, total: int) -> None:
        """Begin at ``step`` of ``total``."""
        self._first, self._total, self._tokens = step, total, 0
        self._begin = self._line = time.perf_counter()
        if self._quiet or not self._console.is_terminal:
            return
        self._bar = RichProgress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=self._console,
        )
        self._bar.start()
        self._bar.add_task("training", total=total, completed=step, note="")

    def step(self, step: int, loss: float, num_tokens: int, *, name: str = "loss") -> None:
        """One update done. ``name``: of the number that is shown where it is no loss."""
        self._name = name
        self._tokens += num_tokens
        # A running mean steadies the shown loss; the log has the exact ones.
        self._loss = loss if self._loss is None else 0.9 * self._loss + 0.1 * loss
        now = time.perf_counter()
        rest = self._reported or f"{self._tokens / max(now - self._begin, 1e-9):,.0f} tok/s"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, note=f"{name} {self._loss:.3f}  {rest}")
        elif now - self._line > _SILENCE:
            self._print(step, f"{name} {self._loss:.4f}  {rest}")

    def report(self, step: int, *, loss: float, learning_rate: float, speed: Mapping[str, float]) -> None:
        """A line of the log was written: ``loss`` is the mean since the one before, ``speed`` a lap of the meter."""
        self._reported = f"lr {learning_rate:.2e}  {show_speed(speed)}"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], note=f"{self._name} {self._loss or loss:.3f}  {self._reported}")
        else:
            self._print(step, f"{self._name} {loss:.4f}  {self._reported}")

    def message(self, text: str) -> None:
        """A line above the bar."""
        (self._bar.console if self._bar is not None else self._console).print(text, highlight=False)

    def stop(self) -> None:
        """Remove the live display; safe to call twice."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _print(self, step: int, text: str) -> None:
        if self._quiet:
            return
        self._line = time.perf_counter()
        took = self._line - self._begin
        left = took / max(step - self._first, 1) * (self._total - step)
        end = f"about {show_duration(left)} left" if step < self._total else f"took {show_duration(took)}"
        self._console.print(f"step {step}/{self._total}  {text}  {end}", highlight=False)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


def show_speed(speed: Mapping[str, float]) -> str:
    """A lap of the meter: tokens per second, MFU where it is known, peak memory."""
    share = f"  MFU {speed['mfu']:.0%}" if "mfu" in speed else ""
    size = speed["peak_memory_mb"]
    memory = f"{size / 1024:.2f} GiB" if size >= 1024 else f"{size:.0f} MiB"
    return f"{speed['tokens_per_second']:,.0f} tok/s{share}  {memory}"
