"""Logits in a tensor, and tokens chosen by PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from oarsmith.engine.choice import Choice, Continuation, Draft
from oarsmith.engine.sampler import choose, continuations, prompt_logprobs
from oarsmith.engine.state import SamplingState


class TensorLogits:
    """See `logits.Logits`."""

    def __init__(self, logits_NV: Tensor) -> None:
        self.tensor = logits_NV

    @torch.inference_mode()
    def choose(
        self, rows: Sequence[int], states: Sequence[SamplingState], drafts: Sequence[Draft | None]
    ) -> list[Choice | None]:
        finite = self.tensor.amax(-1).isfinite().tolist()
        places = [place for place, row in enumerate(rows) if finite[row]]
        found: list[Choice | None] = [None] * len(rows)
        if places:
            logits_NV = self._rows([rows[place] for place in places])
            choices = choose(logits_NV, [states[place] for place in places], [drafts[place] for place in places])
            for place, choice in zip(places, choices, strict=True):
                found[place] = choice
        return found

    @torch.inference_mode()
    def prompt_choices(self, targets: Sequence[int], top: int) -> list[Choice]:
        return prompt_logprobs(self.tensor, torch.tensor(targets, device=self.tensor.device), top)

    @torch.inference_mode()
    def continuations(
        self, rows: Sequence[int], states: Sequence[SamplingState], scores: Sequence[float], count: int, top: int
    ) -> list[Continuation] | None:
        logits_NV = self._rows(rows)
        if not bool(logits_NV.amax(-1).isfinite().all()):
            return None
        return continuations(logits_NV, states, scores, count, top)

    def _rows(self, rows: Sequence[int]) -> Tensor:
        if list(rows) == list(range(len(self.tensor))):
            return self.tensor
        return self.tensor[torch.tensor(rows, dtype=torch.int64, device=self.tensor.device)]
