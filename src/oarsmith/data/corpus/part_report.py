"""What a part of a corpus holds and how often its tokens are drawn."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ComponentReport:
    """One token file.

    Attributes:
        weight: its share of the samples that was asked for, 0 to 1; ``share``: what it has of those drawn.
        documents, empty, tokens: of the part; empty documents have no token.
        samples: drawn from it in the whole run.
        epochs: how often its tokens are seen in them, such as 1.5.
        left_over: tokens behind the last whole sample of the epochs laid out, which no sample has.
    """

    prefix: Path
    weight: float
    share: float
    documents: int
    empty: int
    tokens: int
    samples: int
    epochs: float
    left_over: int

    def line(self) -> str:
        """What is drawn from this file."""
        empty = f" ({self.empty:,} empty)" if self.empty else ""
        return (
            f"  {self.prefix}: {self.share:.1%} of the samples, {self.documents:,} documents{empty}, "
            f"{self.tokens:,} tokens seen {self.epochs:.2f} times{_left_over(self.left_over)}"
        )


@dataclass(frozen=True, kw_only=True)
class PartReport:
    """The account of one part (``train``, ``valid``, ``test``) of a corpus.

    Attributes:
        num_samples: drawn in the whole run, of ``seq_len`` trained tokens each.
        notes: what a reader should know about files and caches that is no error.
    """

    part: str
    seq_len: int
    num_samples: int
    components: tuple[ComponentReport, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return {
            "part": self.part,
            "sequence_length": self.seq_len,
            "samples": self.num_samples,
            "documents": sum(component.documents for component in self.components),
            "tokens": sum(component.tokens for component in self.components),
            "drawn_tokens": self.num_samples * self.seq_len,
            "components": [{**asdict(component), "prefix": str(component.prefix)} for component in self.components],
            "notes": list(self.notes),
        }

    def lines(self) -> list[str]:
        """The report as a few lines of text."""
        documents = sum(component.documents for component in self.components)
        tokens = sum(component.tokens for component in self.components)
        found = [
            f"{self.part}: {documents:,} documents, {tokens:,} tokens; {self.num_samples:,} samples of "
            f"{self.seq_len:,} tokens are drawn ({self.num_samples * self.seq_len / tokens:.2f} times the tokens)"
        ]
        if len(self.components) == 1:
            found[0] += _left_over(self.components[0].left_over)
        if len(self.components) > 1:
            found += [component.line() for component in self.components]
        return found + list(self.notes)


def _left_over(num_tokens: int) -> str:
    return f", {num_tokens:,} tokens left over at the end" if num_tokens else ""
