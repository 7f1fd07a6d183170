"""The native step as what computes the engine's steps. Shapes: N rows that need logits, V vocabulary."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from oarsmith.engine.backend import Part
from oarsmith.engine.state import SamplingState
from oarsmith.native.sample import Row
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


def sampling_row(state: SamplingState) -> Row:
    """What a request's sampling says of its next token; takes the next of its random numbers."""
    sampling, seen = state.sampling, state.occurrences
    wanted = sampling.logprobs is not None or sampling.num_samples > sampling.n
    return Row(
        temperature=0.0 if sampling.greedy else sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        typical_p=sampling.typical_p,
        uniform=0.0 if sampling.greedy else state.uniform(),
        allowed=state.allowed(),
        banned=array("q", state.banned),
        bias_ids=state.bias_ids,
        bias=state.bias,
        seen=array("q") if seen is None else seen.ids,
        seen_counts=array("f") if seen is None else seen.counts,
        repetition=sampling.repetition_penalty,
        frequency=sampling.frequency_penalty,
        presence=sampling.presence_penalty,
        num_top=(sampling.logprobs or 0) if wanted else None,
    )
