"""Log-probabilities of answers by the model that trains and by its reference, before anything is learned from them.

Shapes: N tokens that the model wrote.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from oarsmith.adapters.linear import disabled
from oarsmith.data.policy_batch import Floats, Learned, make_policy_batch
from oarsmith.losses.policy.scoring import score_policy
from oarsmith.models.decoder import Decoder


@dataclass(frozen=True, kw_only=True)
class Referee:
    """Scores answers without gradient.

    Args:
        model: the policy.
        reference: a frozen decoder; None: the policy without its adapter.
        temperature: that answers are drawn at.
        capacity: tokens that go through a model at a time.
        share: whether a prompt is read once for its answers.
    """

    model: Decoder
    reference: Decoder | None
    temperature: float
    capacity: int
    share: bool

    def policy(self, answers: Sequence[Learned]) -> list[Floats]:
        """Of each answer, its tokens under the policy as it is."""
        return self._score(self.model, answers)

    def judged(self, answers: Sequence[Learned]) -> list[Floats]:
        """Of each answer, its tokens under the reference."""
        if self.reference is not None:
            return self._score(self.reference, answers)
        with disabled(self.model):
            return self._score(self.model, answers)

    @torch.no_grad()
    def _score(self, model: Decoder, answers: Sequence[Learned]) -> list[Floats]:
        training = model.training
        model.eval()
        found: list[Floats] = []
        for chosen in in_passes(answers, self.capacity):
            batch = make_policy_batch(chosen, count=1.0, facts={}, share=self.share)
            logprobs_N = score_policy(model, batch, temperature=self.temperature).logprobs_N.float().cpu()
            found += [np.asarray(part) for part in logprobs_N.split(list(batch.sizes))]
        model.train(training)
        return found


def in_passes(answers: Sequence[Learned], capacity: int) -> list[list[Learned]]:
    """Answers in their order, as many at a time as have ``capacity`` tokens (at least one)."""
    passes: list[list[Learned]] = []
    size = 0
    for answer in answers:
        new = len(answer.ids) + len(answer.prompt)
        if passes and size + new <= capacity:
            # A prompt that was read for the answer before is not read again.
            size += len(answer.ids) if answer.prompt is passes[-1][-1].prompt else new
            passes[-1].append(answer)
        else:
            passes.append([answer])
            size = new
    return passes
