"""How far work on rows is: a bar on a terminal; elsewhere a line from time to time."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from oarsmith.training.numbers import show_duration

_SECONDS = 30.0


class RowProgress:
    """Rows from ``first`` to ``total``, and the tokens that were computed for them.

    Args:
        what: is done with them.
        unit: what they are called.
        quiet: no bar in any case.
    """

    def __init__(
        self,
        console: Console,
        first: int,
        total: int,
        what: str = "answering",
        *,
        unit: str = "rows",
        quiet: bool = False,
    ) -> None:
        self._console, self._unit = console, unit
        self._first, self._done, self._total = first, first, total
        self._num_tokens = 0
        self._begin = self._said = time.perf_counter()
        self._bar = Progress(
            TextColumn(what),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            speed_estimate_period=300,
            disable=quiet or not console.is_terminal,
        )
        if not self._bar.disable:
            self._task = self._bar.add_task(what, total=total, completed=first, speed="")

    def add(self, num_tokens: int, num_rows: int = 1) -> None:
        """One more row is done, or several."""
        self._done += num_rows
        self._num_tokens += num_tokens
        now = time.perf_counter()
        if not self._bar.disable:
            self._bar.update(self._task, completed=self._done, speed=f"{self._speed(now):,.1f} tokens/s")
        elif now - self._said >= _SECONDS:
            self._said = now
            left = (now - self._begin) / (self._done - self._first) * (self._total - self._done)
            self._console.print(
                f"{self._done:,} of {self._total:,} {self._unit}, {self._speed(now):,.1f} tokens/s, "
                f"about {show_duration(left)} left",
                soft_wrap=True,
            )

    def message(self, text: str) -> None:
        """A line above the bar."""
        self._bar.console.print(text, markup=False, soft_wrap=True)

    def _speed(self, now: float) -> float:
        return self._num_tokens / max(now - self._begin, 1e-9)

    def __enter__(self) -> RowProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        now = time.perf_counter()
        if self._done > self._first:
            done = f"{self._num_tokens:,} tokens" if self._num_tokens else f"{self._done:,} {self._unit}"
            speed = f" ({self._speed(now):,.1f} tokens/s)" if self._num_tokens else ""
            self._console.print(f"{done} in {show_duration(now - self._begin)}{speed}", style="dim", soft_wrap=True)
