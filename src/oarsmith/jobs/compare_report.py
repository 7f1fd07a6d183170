"""What ``oarsmith compare`` found: numbers of each run, a table and a picture."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from oarsmith.training.numbers import show_duration
from oarsmith.training.run_parts import RunParts, read_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The last loss is the mean of so large a part of the run: single steps scatter.
_TAIL = 0.1


@dataclass(frozen=True)
class Outcome:
    """One run. ``losses``, ``evaluations``: (step, loss in nats per token); ``step_seconds``: the median of a step."""

    name: str
    losses: list[tuple[int, float]]
    evaluations: list[tuple[int, float]]
    trained: int
    total: int
    peak_mb: float
    tokens_per_second: float
    step_seconds: float
    seconds: float
    file_bytes: int

    @property
    def loss(self) -> float:
        """Training loss over the last tenth of the steps."""
        tail = self.losses[-max(1, round(_TAIL * len(self.losses))) :]
        return fmean(loss for _, loss in tail) if tail else float("nan")

    @property
    def eval_loss(self) -> float | None:
        """Of the last evaluation."""
        return self.evaluations[-1][1] if self.evaluations else None

    def line(self) -> str:
        """In words."""
        evaluated = "" if self.eval_loss is None else f", evaluation {self.eval_loss:.4f}"
        return f"loss {self.loss:.4f}{evaluated}, {self.peak_mb:,.0f} MiB, {show_duration(self.seconds)}"

    def record(self) -> dict[str, Any]:
        """As plain values."""
        return {**asdict(self), "loss": self.loss, "eval_loss": self.eval_loss}


def read_outcome(name: str, folder: Path) -> Outcome:
    """From a finished run's folder."""
    run = read_run(folder)
    facts = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    weights = [path for part in ("adapter", "model") for path in sorted((folder / part).glob("*.safetensors"))]
    speeds = [timing.tokens_per_second for timing in run.timings]
    laps = [later - before for before, later in pairwise([0, *(timing.step for timing in run.timings)])]
    tokens = _tokens_a_step(run)
    return Outcome(
        name,
        [(record.step, record.loss) for record in run.training if record.loss is not None],
        [(record.step, record.eval_loss) for record in run.evaluations if record.eval_loss is not None],
        facts["trained"],
        facts["parameters"],
        max((timing.peak_memory_mb for timing in run.timings), default=float("nan")),
        median(speeds) if speeds else float("nan"),
        tokens / median(speeds) if speeds else float("nan"),
        sum(steps * tokens / speed for steps, speed in zip(laps, speeds, strict=True)),
        sum(path.stat().st_size for path in weights),
    )


def _tokens_a_step(run: RunParts) -> float:
    counts = [record.tokens / record.step for record in run.training if record.tokens and record.step]
    return counts[-1] if counts else float("nan")


COLUMNS: tuple[tuple[str, Callable[[Outcome], str]], ...] = (
    ("loss", lambda o: f"{o.loss:.4f}"),
    ("evaluation", lambda o: "" if o.eval_loss is None else f"{o.eval_loss:.4f}"),
    ("trained parameters", lambda o: f"{o.trained:,} ({o.trained / o.total:.2%})"),
    ("file, MB", lambda o: f"{o.file_bytes / 1e6:,.2f}"),
    ("peak memory, MiB", lambda o: f"{o.peak_mb:,.0f}"),
    ("a step, s", lambda o: f"{o.step_seconds:.2f}"),
    ("tokens/s", lambda o: f"{o.tokens_per_second:,.0f}"),
    ("time", lambda o: show_duration(o.seconds)),
)


def table(outcomes: Sequence[Outcome]) -> str:
    """A table in Markdown, the best evaluation first, or the best training loss where there is none."""
    ordered = sorted(outcomes, key=lambda o: o.loss if o.eval_loss is None else o.eval_loss)
    lines = ["| method | " + " | ".join(heading for heading, _ in COLUMNS) + " |"]
    lines.append("|---" * (len(COLUMNS) + 1) + "|")
    lines += [f"| {o.name} | " + " | ".join(show(o) for _, show in COLUMNS) + " |" for o in ordered]
    return "\n".join(lines)


_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f3c8d", "#444444")
_LINES = ("-", "--", ":", "-.")


def draw(outcomes: Sequence[Outcome], title: str) -> bytes:
    """A PNG: the losses over the steps, and beside them, on a line of its own for each run, what it came to."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from oarsmith.training.plots import STYLE

    evaluated = all(o.eval_loss is not None for o in outcomes)
    last = [o.loss if o.eval_loss is None or not evaluated else o.eval_loss for o in outcomes]
    with matplotlib.rc_context(STYLE):
        height = max(4.2, 0.3 * len(outcomes) + 1.6)
        figure = Figure(figsize=(14, height), dpi=160, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        figure.suptitle(title, fontsize=10)
        curves, losses, memory, seconds = figure.subplots(1, 4, width_ratios=(4, 1.3, 1, 1))
        _curves(curves, outcomes)
        _dots(losses, "evaluation" if evaluated else "loss", outcomes, last)
        _bars(memory, "peak memory, MiB", [o.peak_mb for o in outcomes], "{:,.0f}")
        _bars(seconds, "a step, s", [o.step_seconds for o in outcomes], "{:.2f}")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _look(number: int) -> dict[str, Any]:
    return {"color": _COLOURS[number % len(_COLOURS)], "linestyle": _LINES[number // len(_COLOURS) % len(_LINES)]}


def _curves(ax: Axes, outcomes: Sequence[Outcome]) -> None:
    import numpy as np

    from oarsmith.training.plots import running_mean

    for number, outcome in enumerate(outcomes):
        steps, losses = (np.array(values, dtype=float) for values in zip(*outcome.losses, strict=True))
        ax.plot(steps, running_mean(losses), linewidth=1.5, label=outcome.name, **_look(number))
        if outcome.evaluations:
            at, evaluated = zip(*outcome.evaluations, strict=True)
            ax.plot(at, evaluated, "s", markersize=4, color=_look(number)["color"])
    evaluated_too = ", squares: evaluations" if any(o.evaluations for o in outcomes) else ""
    ax.set_xlabel(f"optimizer step (running mean{evaluated_too})")
    ax.set_ylabel("loss (nats per token)")


def _dots(ax: Axes, heading: str, outcomes: Sequence[Outcome], values: list[float]) -> None:
    """A loss of each run behind its name and a piece of its curve: the key of them all."""
    places = _rows(ax, heading, len(values))
    for number, (outcome, value) in enumerate(zip(outcomes, values, strict=True)):
        look = _look(number)
        ax.plot(value, places[number], "s", markersize=5, color=look["color"])
        ax.text(value, places[number], f"  {value:.3f}", va="center", fontsize=7.5, color="#333333")
        across = ax.get_yaxis_transform()
        ax.plot((-0.2, -0.03), (places[number],) * 2, transform=across, clip_on=False, linewidth=1.5, **look)
        method, _, settings = outcome.name.partition(":")
        ax.text(
            -0.24,
            places[number],
            method if not settings else f"{method}\n{settings.replace(':', ', ')}",
            transform=across,
            ha="right",
            va="center",
            fontsize=6.8,
            linespacing=1.15,
        )
    low, high = min(values), max(values)
    room = max(high - low, 1e-3)
    ax.set_xlim(low - 0.1 * room, high + 0.55 * room)


def _bars(ax: Axes, heading: str, values: list[float], form: str) -> None:
    places = _rows(ax, heading, len(values))
    ax.barh(places, values, height=0.62, color=[_look(number)["color"] for number in range(len(values))])
    for place, value in zip(places, values, strict=True):
        ax.text(value, place, " " + form.format(value), va="center", fontsize=7.5, color="#333333")
    ax.set_xlim(0, 1.45 * max(values))


def _rows(ax: Axes, heading: str, count: int) -> list[int]:
    """A line for each run, the first at the top."""
    ax.set_yticks([])
    ax.set_ylim(-0.6, count - 0.4)
    ax.grid(visible=False)
    ax.set_title(heading, fontsize=9)
    return list(range(count))[::-1]
