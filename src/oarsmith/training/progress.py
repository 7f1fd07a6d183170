"""What a person sees while training: a bar with ETA, loss and tokens per second; lines where there is no terminal."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from oarsmith.training.numbers import show_duration

# Seconds between lines when the output is not a terminal.
_LINE_EVERY = 15.0


class Progress:
    """Step progress on a console. ``quiet`` prints nothing but messages."""

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self._console = console
        self._quiet = quiet
        self._bar: RichProgress | None = None
        self._first = self._total = self._tokens = 0
        self._begin = self._line = time.perf_counter()
        self._loss: float | None = None

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

    def step(self, step: int, loss: float, num_tokens: int) -> None:
        """One update done."""
        self._tokens += num_tokens
        # A running mean steadies the shown loss; the log has the exact ones.
        self._loss = loss if self._loss is None else 0.9 * self._loss + 0.1 * loss
        now = time.perf_counter()
        speed = self._tokens / max(now - self._begin, 1e-9)
        note = f"loss {self._loss:.3f}  {speed:,.0f} tok/s"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, note=note)
        elif not self._quiet and (now - self._line > _LINE_EVERY or step == self._total):
            self._line = now
            took = now - self._begin
            left = took / (step - self._first) * (self._total - step)
            end = f"about {show_duration(left)} left" if step < self._total else f"took {show_duration(took)}"
            self._console.print(f"step {step}/{self._total}  {note}  {end}", highlight=False)

    def message(self, text: str) -> None:
        """A line above the bar."""
        (self._bar.console if self._bar is not None else self._console).print(text, highlight=False)

    def stop(self) -> None:
        """Remove the live display; safe to call twice."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
