"""What quantizing cost and brought: numbers, words, a table of layers and a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from oarsmith.quantize.layer import PieceResult
from oarsmith.quantize.proof import Comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WORST = 5
_BLUE, _GREY = "#0072b2", "#8a8a8a"


@dataclass(frozen=True, kw_only=True)
class PieceReport:
    """One map of the files: bits of a weight, relative squared error, tokens that it saw in calibration."""

    name: str
    layer: int
    bits: int
    error: float
    num_tokens: int | None

    @classmethod
    def of(cls, layer: int, result: PieceResult) -> PieceReport:
        """Of what became of a piece."""
        piece = result.piece
        name = (
            piece.stem if piece.expert is None or f".{piece.expert}." in piece.stem else f"{piece.stem}[{piece.expert}]"
        )
        bits = result.quantized.grid.bits
        return cls(name=name, layer=layer, bits=bits, error=result.error, num_tokens=result.num_tokens)


@dataclass(frozen=True, kw_only=True)
class Report:
    """A run of ``oarsmith quantize``.

    Attributes:
        comparison: None where there was no text to compare on.
        file_bytes: of all weights, and ``original_bytes`` of those they were made of.
        speed: tokens a second that the engine writes alone, and ``original_speed`` with the original.
    """

    scheme: str
    algorithm: str
    layout: str
    pieces: tuple[PieceReport, ...]
    comparison: Comparison | None
    file_bytes: int
    original_bytes: int
    seconds: float
    peak_mb: float
    speed: float | None = None
    original_speed: float | None = None

    @property
    def worst(self) -> list[PieceReport]:
        """Maps with the largest error, the worst first."""
        return sorted(self.pieces, key=lambda piece: -piece.error)[:_WORST]

    @property
    def starved(self) -> list[PieceReport]:
        """Maps of which calibration saw fewer tokens than a quarter of what they saw in the middle."""
        seen = sorted(piece.num_tokens for piece in self.pieces if piece.num_tokens is not None)
        least = seen[len(seen) // 2] / 4 if seen else 0
        return [piece for piece in self.pieces if piece.num_tokens is not None and piece.num_tokens < least]

    def lines(self) -> list[str]:
        """In words."""
        found = []
        if self.comparison is not None:
            own = self.comparison
            found.append(
                f"on {own.num_tokens:,} held-out tokens: KL {own.kl:.4f} nats, perplexity {own.perplexity:.3f} "
                f"(original {own.original:.3f}), same likeliest token {own.top1:.1%}"
            )
        else:
            found.append("note: not compared with the original; give a text for that: --proof_text FILE")
        if self.algorithm == "rtn" and any(piece.bits < 8 for piece in self.pieces):
            found.append(
                "note: rounded to nearest; a calibration text (--calibration FILE) keeps much more of the model"
            )
        found.append(
            f"size {self.file_bytes / 1e6:,.1f} MB of {self.original_bytes / 1e6:,.1f} "
            f"({self.file_bytes / max(1, self.original_bytes):.0%}); {self.seconds:,.1f} s, {self.peak_mb:,.0f} MiB"
        )
        if self.speed is not None and self.original_speed is not None:
            ratio = self.speed / self.original_speed
            found.append(f"writes {self.speed:,.0f} tokens/s alone, {ratio:.2f} times the original")
        if self.worst:
            found.append("worst maps: " + ", ".join(f"{p.name} {p.error:.2%}" for p in self.worst[:3]))
        if self.starved:
            few = min(self.starved, key=lambda piece: piece.num_tokens or 0)
            found.append(
                f"note: {len(self.starved)} maps saw few tokens in calibration, {few.name} only {few.num_tokens}; "
                "raise calibration_samples"
            )
        return found

    def record(self) -> dict[str, Any]:
        """As plain values."""
        own = self.comparison
        return {
            "scheme": self.scheme,
            "algorithm": self.algorithm,
            "layout": self.layout,
            **(
                {} if own is None else {"kl": own.kl, "perplexity": own.perplexity, "original_perplexity": own.original}
            ),
            **({} if own is None else {"top1": own.top1, "num_tokens": own.num_tokens}),
            "file_bytes": self.file_bytes,
            "original_bytes": self.original_bytes,
            "seconds": self.seconds,
            "peak_mb": self.peak_mb,
            "tokens_per_second": self.speed,
            "original_tokens_per_second": self.original_speed,
            "maps": [
                {"name": p.name, "bits": p.bits, "error": p.error, "num_tokens": p.num_tokens} for p in self.pieces
            ],
        }


def draw(report: Report) -> bytes:
    """A PNG: the error of each map over the layers, and bars of what it all came to."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from oarsmith.training.plots import STYLE

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 4.2), dpi=160, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        own = report.comparison
        proof = "" if own is None else f": KL {own.kl:.4f} nats, perplexity {own.original:.2f} to {own.perplexity:.2f}"
        figure.suptitle(f"{report.scheme}, {report.algorithm}{proof}", fontsize=10)
        errors, size, speed = figure.subplots(1, 3, width_ratios=(4, 1, 1))
        _errors(errors, report.pieces)
        _pair(size, "size, MB", report.original_bytes / 1e6, report.file_bytes / 1e6)
        if report.speed is not None and report.original_speed is not None:
            _pair(speed, "tokens/s, alone", report.original_speed, report.speed)
        else:
            speed.set_axis_off()
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _errors(ax: Axes, pieces: Sequence[PieceReport]) -> None:
    kinds: dict[str, list[PieceReport]] = {}
    for piece in pieces:
        kinds.setdefault(piece.name.rpartition(".")[2], []).append(piece)
    markers = "osv^D*PX<>"
    for number, (kind, own) in enumerate(kinds.items()):
        at = [piece.layer for piece in own]
        ax.plot(at, [piece.error for piece in own], markers[number % len(markers)], markersize=4, alpha=0.8, label=kind)
    if any(piece.error > 0 for piece in pieces):
        ax.set_yscale("log")
    ax.set_xlabel("layer")
    ax.set_ylabel("squared error of outputs, relative")
    if kinds:
        ax.legend(fontsize=7.5, ncols=2)


def _pair(ax: Axes, heading: str, before: float, after: float) -> None:
    ax.bar(["original", "quantized"], [before, after], color=[_GREY, _BLUE], width=0.6)
    for at, value in enumerate((before, after)):
        ax.text(at, value, f"{value:,.0f}", ha="center", va="bottom", fontsize=8)
    ax.set_title(heading, fontsize=9)
    ax.set_ylim(0, 1.15 * max(before, after, 1e-9))
