"""The native step as what computes the engine's steps. PyTorch comes in only with what the step does not do."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

from oarsmith.engine.backend import Part
from oarsmith.engine.choice import Choice, Continuation, Draft
from oarsmith.engine.state import SamplingState
from oarsmith.native.sample import Row
from oarsmith.native.step import Step

if TYPE_CHECKING:
    from torch import Tensor

    from oarsmith.engine.tensor_logits import TensorLogits


class NativeBackend:
    """A program of the compiled step, with its cache."""

    def __init__(self, step: Step) -> None:
        self._step = step

    def compute(self, parts: Sequence[Part]) -> None:
        self._step.run(parts)

    def logits(self, places: Sequence[int]) -> NativeLogits:
        return NativeLogits(self._step, places)

    def copy_page(self, source: int, target: int) -> None:
        self._step.copy_page(source, target)

    def copy_sequence(self, source: int, target: int) -> None:
        self._step.copy_sequence(source, target)


class NativeLogits:
    """Logits in memory of their own; see `logits.Logits`. What the compiled sampler does not do, PyTorch does."""

    def __init__(self, step: Step, places: Sequence[int]) -> None:
        self._step = step
        self._shape = len(places), step.program.facts.vocab_size
        self._memory = (ctypes.c_float * (self._shape[0] * self._shape[1]))()
        self._start = ctypes.addressof(self._memory)
        step.logits(places, self._start)

    @property
    def tensor(self) -> Tensor:
        import torch

        return torch.frombuffer(self._memory, dtype=torch.float32).view(self._shape)

    def choose(
        self, rows: Sequence[int], states: Sequence[SamplingState], drafts: Sequence[Draft | None]
    ) -> list[Choice | None]:
        if any(draft is not None and draft.probs_V is not None for draft in drafts):
            return self._in_tensor().choose(rows, states, drafts)
        wanted = [sampling_row(state) for state in states]
        return [
            None if sampled.token is None else Choice(sampled.token, sampled.logprob, sampled.top)
            for sampled in self._step.sample([self._address(row) for row in rows], wanted)
        ]

    def prompt_choices(self, targets: Sequence[int], top: int) -> list[Choice]:
        return self._in_tensor().prompt_choices(targets, top)

    def continuations(
        self, rows: Sequence[int], states: Sequence[SamplingState], scores: Sequence[float], count: int, top: int
    ) -> list[Continuation] | None:
        return self._in_tensor().continuations(rows, states, scores, count, top)

    def _address(self, row: int) -> int:
        return self._start + 4 * self._shape[1] * row

    def _in_tensor(self) -> TensorLogits:
        from oarsmith.engine.tensor_logits import TensorLogits

        return TensorLogits(self.tensor)


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
