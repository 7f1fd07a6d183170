"""What was chosen, and what was guessed. No PyTorch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Choice:
    """A token of an answer or a prompt.

    Attributes:
        logprob: natural logarithm of its probability in the model's own distribution, before anything that the
            sampling does to it; None where nobody asked.
        top: the likeliest tokens of that distribution with theirs, likeliest first, as many as were asked for.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Continuation:
    """A token that one of several sequences may go on with.

    Attributes:
        parent: which of them.
        total: log-probability of the whole, as far as it was counted.
    """

    parent: int
    total: float
    choice: Choice


@dataclass(frozen=True)
class Draft:
    """A token that somebody guesses.

    Attributes:
        probs_V: what it was drawn from, float64; None: it was not drawn.
    """

    token: int
    probs_V: Tensor | None = None
