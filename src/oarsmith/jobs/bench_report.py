"""What ``oarsmith bench`` found: numbers of each measurement, their spread, a table and a picture."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Found = Mapping[str, Sequence[Mapping[str, float]]]
"""Of each engine the numbers of its measurements."""


@dataclass(frozen=True)
class Quantity:
    """A number of a measurement: its name, heading, unit, digits behind the point, and whether more is better."""

    name: str
    heading: str
    unit: str
    digits: int
    more_is_better: bool = False


QUANTITIES = (
    Quantity("first_token_ms", "first token, alone", "ms", 1),
    Quantity("first_token_p95_ms", "p95", "ms", 1),
    Quantity("token_ms", "per token, alone", "ms", 2),
    Quantity("token_p95_ms", "p95", "ms", 2),
    Quantity("decode_tokens_per_s", "answer, alone", "tokens/s", 1, True),
    Quantity("prefill_tokens_per_s", "prompt", "tokens/s", 0, True),
    Quantity("output_tokens_per_s", "answers, together", "tokens/s", 1, True),
    Quantity("total_tokens_per_s", "with their prompts", "tokens/s", 1, True),
    Quantity("together_first_token_ms", "first token, together", "ms", 0),
    Quantity("together_first_token_p95_ms", "p95", "ms", 0),
    Quantity("together_token_ms", "per token, together", "ms", 1),
    Quantity("together_token_p95_ms", "p95", "ms", 1),
    Quantity("peak_mb", "peak memory", "MiB", 0),
    Quantity("cold_start_s", "start to first token", "s", 2),
    Quantity("load_s", "start to loaded", "s", 2),
)
_DRAWN = ("first_token_ms", "token_ms", "prefill_tokens_per_s", "output_tokens_per_s", "peak_mb", "cold_start_s")
# Threads of one engine wait so long for one another's processors at the most.
_QUIET = 0.1


def numbers_of(measured: Mapping[str, Any]) -> dict[str, float]:
    """The quantities of one measurement (see ``bench_worker.measure``)."""
    alone, together = measured["alone"]["answers"], measured["together"]["answers"]
    first, gaps = _first_tokens(alone), _gaps(alone)
    all_first, all_gaps = _first_tokens(together), _gaps(together)
    seconds = max(one["times"][-1] for one in together) - min(one["begin"] for one in together)
    output = sum(len(one["times"]) for one in together)
    return {
        "first_token_ms": 1e3 * median(first),
        "first_token_p95_ms": 1e3 * quantile(first, 0.95),
        "token_ms": 1e3 * median(gaps),
        "token_p95_ms": 1e3 * quantile(gaps, 0.95),
        "decode_tokens_per_s": len(gaps) / sum(gaps),
        "prefill_tokens_per_s": sum(one["prompt_tokens"] for one in alone) / sum(first),
        "output_tokens_per_s": output / seconds,
        "total_tokens_per_s": (output + sum(one["prompt_tokens"] for one in together)) / seconds,
        "together_first_token_ms": 1e3 * median(all_first),
        "together_first_token_p95_ms": 1e3 * quantile(all_first, 0.95),
        "together_token_ms": 1e3 * median(all_gaps),
        "together_token_p95_ms": 1e3 * quantile(all_gaps, 0.95),
        "peak_mb": measured["peak_mb"],
        "cold_start_s": measured["cold_start_s"],
        "load_s": measured["load_s"],
        "waited": max(measured["alone"]["waited"], measured["together"]["waited"]),
    }


def _first_tokens(answers: Sequence[Mapping[str, Any]]) -> list[float]:
    return [one["times"][0] - one["begin"] for one in answers]


def _gaps(answers: Sequence[Mapping[str, Any]]) -> list[float]:
    """Seconds between the tokens of each answer."""
    return [after - before for one in answers for before, after in pairwise(one["times"])]


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of all does not exceed."""
    return sorted(values)[max(math.ceil(share * len(values)) - 1, 0)]


def same_tokens(ours: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """The share of the requests answered alone that have the very same tokens."""
    pairs = list(zip(ours["alone"]["answers"], other["alone"]["answers"], strict=True))
    return sum(a["ids"] == b["ids"] for a, b in pairs) / len(pairs)


def spread(values: Sequence[float], digits: int) -> str:
    """The median, and the smallest and the largest value where there are several."""
    middle = f"{median(values):,.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):,.{digits}f}-{max(values):,.{digits}f})"


def table(found: Found, same: Mapping[str, float]) -> str:
    """A Markdown table: a row for each quantity, a column for each engine; medians over the repetitions."""
    systems = list(found)
    lines = [["", "", *systems]]
    for quantity in QUANTITIES:
        cells = [spread([one[quantity.name] for one in found[system]], quantity.digits) for system in systems]
        lines.append([quantity.heading, quantity.unit, *cells])
    if same:
        lines.append(["same tokens", "of answers", *(f"{same[s]:.0%}" if s in same else "" for s in systems)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    return "\n".join([text[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *text[1:]])


def disturbed(found: Found) -> str | None:
    """A warning where something else took the processors meanwhile."""
    most = {system: max(one["waited"] for one in ones) for system, ones in found.items()}
    shown = [f"{system} {share:.0%}" for system, share in most.items() if share > _QUIET]
    if not shown:
        return None
    return f"something else was running: threads waited for a processor, {', '.join(shown)} of the time at the most"


def draw(found: Found, title: str) -> bytes:
    """A PNG: a panel for each of the main quantities, a bar for each engine, from the smallest to the largest value."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from oarsmith.training.plots import STYLE

    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        height = 0.9 + 0.32 * len(found)
        figure = Figure(figsize=(9, 2 * height + 0.5), dpi=200, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        figure.suptitle(title, fontsize=10)
        axes: list[Axes] = list(figure.subplots(2, 3).flat)
        for number, (ax, name) in enumerate(zip(axes, _DRAWN, strict=True)):
            quantity = next(one for one in QUANTITIES if one.name == name)
            _bars(ax, quantity, {system: [one[name] for one in ones] for system, ones in found.items()})
            if number % 3:
                ax.set_yticklabels([])
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


# Okabe and Ito's palette, as in the pictures of runs: ours first.
_COLOURS = ("#0072b2", "#8a8a8a", "#8a8a8a", "#8a8a8a")


def _bars(ax: Axes, quantity: Quantity, values: Mapping[str, Sequence[float]]) -> None:
    middles = [median(ones) for ones in values.values()]
    places = list(range(len(values)))[::-1]
    ax.barh(places, middles, height=0.62, color=_COLOURS[: len(values)])
    for place, ones, middle in zip(places, values.values(), middles, strict=True):
        if len(ones) > 1:
            ax.plot([min(ones), max(ones)], [place, place], color="#333333", linewidth=1.2)
        ax.text(max(ones), place, f" {middle:,.{quantity.digits}f}", va="center", fontsize=8, color="#333333")
    ax.set_yticks(places, list(values))
    ax.tick_params(axis="y", length=0)
    ax.set_xlim(0, 1.3 * max(max(ones) for ones in values.values()))
    better = "more" if quantity.more_is_better else "less"
    ax.set_title(f"{quantity.heading} ({quantity.unit}, {better} is better)", fontsize=8.5)
