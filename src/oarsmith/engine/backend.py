"""What computes the engine's steps: the decoder over its paged cache, or the native step in its place.

No PyTorch here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from oarsmith.engine.logits import Logits


@dataclass(frozen=True)
class Part:
    """Tokens that a step brings of one sequence.

    Attributes:
        start: the place of the first of them in the sequence.
        row: the sequence's row in the cache; ``pages``: its pages, in the order of its tokens.
        prompt_size: tokens of its prompt, or of what is read as such.
        adapter: the name of the one it goes through.
        asked: tokens of its prompt; None: ``prompt_size``.
    """

    tokens: Sequence[int]
    start: int
    row: int
    pages: Sequence[int]
    prompt_size: int
    adapter: str | None = None
    asked: int | None = None


class Backend(Protocol):
    """Computes steps and keeps keys and values."""

    def compute(self, parts: Sequence[Part]) -> None:
        """Bring the parts into the cache; their hidden states are kept until the next call."""

    def logits(self, places: Sequence[int]) -> Logits:
        """What comes after the tokens at these places of the last step, counted over all its parts."""

    def copy_page(self, source: int, target: int) -> None:
        """Make a page hold what another holds."""

    def copy_sequence(self, source: int, target: int) -> None:
        """Let a row of the cache go on from where another is; pages are the caller's affair."""
