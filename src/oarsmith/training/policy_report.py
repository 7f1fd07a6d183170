"""What the report of a run shows that learns from rewards: pictures of rewards, entropy, KL, lengths, and some
answers."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from oarsmith.training.log import read_log
from oarsmith.training.plots import STYLE, running_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SAMPLES_FILE = "samples.jsonl"
POLICY_PICTURE = "rewards.png"

_MAX_SAMPLES = 24
_MAX_TEXT = 600
# From here on single records scatter so much that a running mean is drawn over them.
_MIN_SMOOTHED = 40
_BLUE, _RED = "#0072b2", "#d55e00"


@dataclass(frozen=True)
class Panel:
    """One picture of several: a title, and the fields that it shows with their names."""

    title: str
    fields: tuple[tuple[str, str], ...]
    evaluated: tuple[tuple[str, str], ...] = ()


_PANELS = (
    Panel("reward", (("reward", "drawn in training"),), (("eval_reward", "held-out, drawn"),)),
    Panel(
        "share of answers that pass",
        (("pass_rate", "drawn in training"),),
        (("eval_pass_rate", "held-out, drawn"), ("eval_greedy_pass_rate", "held-out, greedy")),
    ),
    Panel("entropy (nats per token)", (("entropy", ""),)),
    Panel("KL to the reference (nats per token)", (("kl", ""),)),
    Panel("tokens an answer", (("length", ""),)),
    Panel("share of answers cut at the limit", (("truncated", ""),)),
    Panel("share of tokens clipped", (("clip_low", "below"), ("clip_high", "above"))),
    Panel("share of prompts whose answers are worth the same", (("no_variance", ""),)),
)


@dataclass(frozen=True)
class PolicySection:
    """``picture``: PNG; ``samples``: the last answers, the newest first."""

    picture: bytes
    samples: Sequence[Mapping[str, Any]]
    text: str


def policy_section(output_dir: Path) -> PolicySection | None:
    """What there is to show; None: the run learned from no rewards."""
    records = read_log(output_dir / "log.jsonl")
    training = [record for record in records if "reward" in record]
    if not training:
        return None
    samples = [_shortened(row) for row in read_log(output_dir / SAMPLES_FILE)[: -_MAX_SAMPLES - 1 : -1]]
    first, last = training[0], training[-1]
    text = f"Reward from {first['reward']:.3g} at step {first['step']} to {last['reward']:.3g} at step {last['step']}"
    return PolicySection(draw_policy(records), samples, text)


def draw_policy(records: Sequence[Mapping[str, Any]]) -> bytes:
    """A PNG of all panels that the log has something for, two side by side."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [panel for panel in _PANELS if any(name in record for record in records for name, _ in panel.fields)]
    rows = -(-len(shown) // 2)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 1.9 * rows + 0.4), dpi=200, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        grid = figure.subplots(rows, 2, squeeze=False)
        for ax, panel in zip(grid.flat, shown, strict=False):
            _draw(ax, panel, records)
        for ax in list(grid.flat)[len(shown) :]:
            ax.set_visible(False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _draw(ax: Axes, panel: Panel, records: Sequence[Mapping[str, Any]]) -> None:
    for (name, label), color in zip(panel.fields, (_BLUE, _RED), strict=False):
        x, y = _points(records, name)
        ax.plot(x, y, color=color, alpha=0.35 if len(x) >= _MIN_SMOOTHED else 1.0, linewidth=1.0)
        smooth = running_mean(y) if len(x) >= _MIN_SMOOTHED else y
        ax.plot(x, smooth, color=color, linewidth=1.5, label=label or None)
    for (name, label), style in zip(panel.evaluated, ("o-", "s--"), strict=False):
        x, y = _points(records, name)
        if len(x):
            ax.plot(x, y, style, color=_RED, markersize=3, linewidth=1.0, label=label)
    ax.set_title(panel.title, fontsize=10, loc="left")
    ax.set_xlabel("step", fontsize=8)
    if ax.get_legend_handles_labels()[1]:
        ax.legend(fontsize=7)


def _points(records: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    found = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    return np.array([step for step, _ in found], dtype=float), np.array([value for _, value in found], dtype=float)


def _shortened(row: Mapping[str, Any]) -> dict[str, Any]:
    texts = {name: str(row.get(name, "")) for name in ("prompt", "answer")}
    cut = {name: text if len(text) <= _MAX_TEXT else text[:_MAX_TEXT] + " …" for name, text in texts.items()}
    reward = row.get("reward")
    return {"step": row["step"], "reward": "none" if reward is None else f"{float(reward):.3g}", **cut}
