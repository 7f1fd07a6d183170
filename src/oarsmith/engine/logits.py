"""What a step knows of the tokens that may come next. No PyTorch here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from oarsmith.engine.choice import Choice, Continuation, Draft
from oarsmith.engine.state import SamplingState

if TYPE_CHECKING:
    from torch import Tensor


class Logits(Protocol):
    """Rows of logits [N, V]."""

    def choose(
        self, rows: Sequence[int], states: Sequence[SamplingState], drafts: Sequence[Draft | None]
    ) -> list[Choice | None]:
        """The next token of each of these rows by its own state (see ``sampler.choose``); None: they are no numbers."""

    def prompt_choices(self, targets: Sequence[int], top: int) -> list[Choice]:
        """The tokens of a prompt, row i being the distribution of ``targets[i]``."""

    def continuations(
        self, rows: Sequence[int], states: Sequence[SamplingState], scores: Sequence[float], count: int, top: int
    ) -> list[Continuation] | None:
        """What beams may go on with (see ``sampler.continuations``); None: the logits are no numbers."""

    @property
    def tensor(self) -> Tensor:
        """All of them, for what looks at them otherwise."""
