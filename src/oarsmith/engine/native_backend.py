"""The native step as what computes the engine's steps. Shapes: N rows that need logits, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from oarsmith.engine.backend import Part
from oarsmith.native.step import Step


class NativeBackend:
    """A program of the compiled step, with its cache."""

    def __init__(self, step: Step) -> None:
        self._step = step

    def compute(self, parts: Sequence[Part]) -> None:
        self._step.run(parts)

    def logits(self, places: Sequence[int]) -> Tensor:
        logits_NV = torch.empty(len(places), self._step.program.vocab_size)
        self._step.logits(places, logits_NV.data_ptr())
        return logits_NV

    def copy_page(self, source: int, target: int) -> None:
        self._step.copy_page(source, target)

    def copy_sequence(self, source: int, target: int) -> None:
        self._step.copy_sequence(source, target)
