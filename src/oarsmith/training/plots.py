"""The picture of a run: loss, learning rate and gradient norm over the steps."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from oarsmith.training.run_parts import LogRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette: told apart also by colour-blind readers and in grey.
_TRAIN, _EVAL, _RATE, _NORM, _BAD = "#0072b2", "#d55e00", "#4d4d4d", "#00795a", "#b00020"
_EVENT_SHAPES = ("v", "1", "d", "+")
# Up to here each record is a visible point; beyond, a line alone is clearer.
_MAX_MARKED = 40
# From here on single records scatter so much that a running mean is drawn over them.
_MIN_SMOOTHED = 80
# Beyond this ratio of the largest to the median value a linear axis shows one spike and a flat line.
_LOG_RATIO = 30.0
# Of all pictures. The stubs of matplotlib list the keys it knows as a Literal, which differs from version to version.
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a8a8a",
    "axes.labelcolor": "#333333",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "legend.frameon": True,
    "legend.framealpha": 0.85,
    "legend.edgecolor": "none",
}


class Series:
    """Points of one curve, in the order of the log. ``y`` may hold NaN and infinity, which are not drawn as points."""

    def __init__(self, points: Iterable[tuple[int, float | None]]) -> None:
        found = [(step, value) for step, value in points if value is not None]
        self.x = np.array([step for step, _ in found], dtype=float)
        self.y = np.array([value for _, value in found], dtype=float)

    @property
    def finite(self) -> np.ndarray:
        return np.isfinite(self.y)


def draw_run(
    training: Sequence[LogRecord],
    evaluations: Sequence[LogRecord],
    events: Sequence[LogRecord] = (),
    *,
    loss_unit: str | None,
) -> bytes:
    """A PNG 1800 pixels wide (900 at twice the density): training and evaluation loss in ``loss_unit`` (None: a plain
    number) with the steps of events; below them, where the log has them, rewards, learning rate and gradient norm."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    loss = Series((record.step, record.loss) for record in training)
    eval_loss = Series((record.step, record.eval_loss) for record in evaluations)
    rate = Series((record.step, record.learning_rate) for record in training)
    norm = Series((record.step, record.grad_norm) for record in training)
    rewards = _Rewards(training, evaluations)
    panels: list[tuple[Series, Callable[[Axes], None]]] = [
        (rewards.chosen, partial(_draw_rewards, rewards=rewards)),
        (rate, partial(_draw_rate, rate=rate)),
        (norm, partial(_draw_norm, norm=norm)),
    ]
    small = [draw for series, draw in panels if series.finite.any()]
    heights = [3.6, *(1.25 for _ in small)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, sum(heights) + 0.6), dpi=200, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        grid = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)
        axes: list[Axes] = list(grid[:, 0])
        _mark_events(axes[0], events)
        _draw_loss(axes[0], loss, eval_loss, f"loss ({loss_unit})" if loss_unit else "loss")
        for ax, draw in zip(axes[1:], small, strict=True):
            draw(ax)
        ends = _epoch_ends(training)
        for ax in axes:
            for step in ends:
                ax.axvline(step, color="#808080", linewidth=0.9, linestyle=(0, (1, 2.5)), zorder=0.5)
        happened = np.array([record.step for record in events], dtype=float)
        _limit_steps(axes[-1], np.concatenate([loss.x, eval_loss.x, happened]))
        axes[-1].xaxis.set_major_locator(MaxNLocator(nbins=10, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
        axes[-1].set_xlabel("optimizer step" + (" (dotted: end of an epoch)" if ends else ""))
        figure.align_ylabels(axes)
        buffer = io.BytesIO()
        # Without the version the same log gives the same bytes on every installation of one matplotlib.
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def running_mean(y: np.ndarray) -> np.ndarray:
    """Mean over a centred window of a twentieth of the points; NaN is left out.

    At the start, where the loss falls fast, the window shrinks on both sides; at the end it is cut off.
    """
    half = max(1, len(y) // 40)
    good = np.isfinite(y)
    sums = np.concatenate([[0.0], np.cumsum(np.where(good, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(good)])
    index = np.arange(len(y))
    reach = np.minimum(half, index)
    low, high = index - reach, np.minimum(len(y), index + reach + 1)
    num = counts[high] - counts[low]
    return np.where(num > 0, (sums[high] - sums[low]) / np.maximum(num, 1), np.nan)


def _draw_loss(ax: Axes, loss: Series, eval_loss: Series, y_label: str) -> None:
    if loss.finite.any():
        last = _short(loss.y[loss.finite][-1])
        if len(loss.x) >= _MIN_SMOOTHED:
            ax.plot(loss.x, loss.y, color=_TRAIN, alpha=0.4, linewidth=0.8, label=f"training, last {last}")
            ax.plot(loss.x, running_mean(loss.y), color=_TRAIN, linewidth=1.8, label="training, running mean")
        else:
            ax.plot(
                loss.x, loss.y, color=_TRAIN, linewidth=1.8, label=f"training, last {last}", **_marker(loss, "o", 4)
            )
    if eval_loss.finite.any():
        label = f"evaluation, last {_short(eval_loss.y[eval_loss.finite][-1])}"
        if eval_loss.finite.sum() > 1:
            lowest = np.nanargmin(np.where(eval_loss.finite, eval_loss.y, np.nan))
            label += f", lowest {_short(eval_loss.y[lowest])} at step {eval_loss.x[lowest]:,.0f}"
            ax.plot(eval_loss.x[lowest], eval_loss.y[lowest], "o", ms=11, mfc="none", mec=_EVAL, mew=1.2, zorder=4)
        ax.plot(
            eval_loss.x, eval_loss.y, color=_EVAL, linewidth=1.8, label=label, zorder=3, **_marker(eval_loss, "s", 5)
        )
    _mark_bad(ax, loss, eval_loss)
    _scale(ax, y_label, loss, eval_loss)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc="upper right")
    else:
        ax.set_yticks([])
        ax.text(0.5, 0.5, "no loss was logged", transform=ax.transAxes, ha="center", va="center", color="#777777")


def _draw_rate(ax: Axes, rate: Series) -> None:
    ax.plot(rate.x, rate.y, color=_RATE, linewidth=1.2, **_marker(rate, "o", 2.5))
    ax.set_ylabel("learning\nrate")
    ax.set_ylim(bottom=0)
    if rate.y[rate.finite].max() > 0:
        ax.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    else:
        ax.set_yticks([0])


class _Rewards:
    """Rewards of chosen and rejected answers, of methods that have them."""

    def __init__(self, training: Sequence[LogRecord], evaluations: Sequence[LogRecord]) -> None:
        self.chosen = Series((record.step, record.rewards_chosen) for record in training)
        self.rejected = Series((record.step, record.rewards_rejected) for record in training)
        self.held_out = tuple(
            Series((record.step, value(record)) for record in evaluations)
            for value in (lambda r: r.eval_rewards_chosen, lambda r: r.eval_rewards_rejected)
        )


def _draw_rewards(ax: Axes, rewards: _Rewards) -> None:
    """Both, and the margin between them as an area; squares: evaluations."""
    chosen, rejected = rewards.chosen, rewards.rejected
    mean = running_mean if len(chosen.x) >= _MIN_SMOOTHED else (lambda y: y)
    ax.fill_between(chosen.x, mean(rejected.y), mean(chosen.y), color=_TRAIN, alpha=0.12, linewidth=0)
    ax.plot(chosen.x, mean(chosen.y), color=_TRAIN, linewidth=1.3, label="chosen")
    ax.plot(rejected.x, mean(rejected.y), color=_EVAL, linewidth=1.3, label="rejected")
    for series, colour in zip(rewards.held_out, (_TRAIN, _EVAL), strict=True):
        ax.plot(series.x, series.y, "s", markersize=4, color=colour)
    ax.set_ylabel("rewards")
    ax.legend(fontsize=8, loc="upper left", ncols=2)


def _draw_norm(ax: Axes, norm: Series) -> None:
    ax.plot(norm.x, norm.y, color=_NORM, linewidth=1.2, **_marker(norm, "o", 2.5))
    _mark_bad(ax, norm)
    _scale(ax, "gradient\nnorm (L2)", norm)
    if ax.get_yscale() == "linear":
        ax.set_ylim(bottom=0)


def _marker(series: Series, shape: str, size: float) -> dict[str, Any]:
    """Points are marked where they are few, and where a lone one has no neighbour to draw a line to."""
    padded = np.concatenate([[False], series.finite, [False]])
    has_lone = bool((padded[1:-1] & ~padded[:-2] & ~padded[2:]).any())
    return {"marker": shape, "markersize": size} if len(series.x) <= _MAX_MARKED or has_lone else {}


def _mark_events(ax: Axes, events: Sequence[LogRecord]) -> None:
    """Triangles along the upper edge, one shape a kind of event."""
    kinds = list(dict.fromkeys(record.event for record in events))
    top = ax.get_xaxis_transform()
    for kind, shape in zip(kinds, _EVENT_SHAPES, strict=False):
        steps = [record.step for record in events if record.event == kind]
        label = f"{kind} ({len(steps)})"
        ax.plot(steps, [0.985] * len(steps), shape, color=_BAD, ms=5, transform=top, label=label, clip_on=False)


def _mark_bad(ax: Axes, *curves: Series) -> None:
    """Crosses along the lower edge where a value was NaN or infinite."""
    steps = np.concatenate([series.x[~series.finite] for series in curves])
    if len(steps):
        bottom = ax.get_xaxis_transform()
        ax.plot(steps, np.full(len(steps), 0.03), "x", color=_BAD, ms=6, transform=bottom, label="not a finite number")


def _scale(ax: Axes, label: str, *curves: Series) -> None:
    y = np.concatenate([series.y[series.finite] for series in curves])
    spread = len(y) > 0 and y.min() > 0 and y.max() > _LOG_RATIO * float(np.median(y))
    if spread:
        ax.set_yscale("log")
    ax.set_ylabel(f"{label}\nlog scale" if spread else label)


def _limit_steps(ax: Axes, steps: np.ndarray) -> None:
    """A margin on both sides; a single record stands in the middle."""
    if len(steps):
        low, high = float(steps.min()), float(steps.max())
        margin = max(0.02 * (high - low), 0.5)
        ax.set_xlim(low - margin, high + margin)


def _epoch_ends(training: Sequence[LogRecord]) -> list[float]:
    """Steps at which an epoch ended, between the records; none where there are more than a reader could use."""
    epochs = Series((record.step, record.epoch) for record in training)
    steps = epochs.x
    if len(steps) < 2 or not epochs.finite.all() or (np.diff(epochs.y) <= 0).any():
        return []
    whole = np.arange(math.floor(epochs.y[0]) + 1, math.floor(epochs.y[-1]) + 1)
    return [float(step) for step in np.interp(whole, epochs.y, steps)] if len(whole) <= 12 else []


def _short(value: float) -> str:
    return f"{value:.3f}" if 1e-2 <= abs(value) < 1e4 else f"{value:.2e}"
