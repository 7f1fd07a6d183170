"""Log-probabilities of answers.

Shapes: T tokens of the batch, N predicted tokens, A answers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from oarsmith import kernels
from oarsmith.data.answers import AnswerBatch
from oarsmith.models.decoder import Decoder
from oarsmith.models.layout import Layout


@dataclass(frozen=True)
class AnswerScores:
    """Answers of a batch under a model.

    Attributes:
        logprobs_N: of each predicted token; ``squares_N``: log sum_v p_v^2 at its place, without gradient, if asked.
        sums_A: float64, of each answer.
        sizes: predicted tokens of each answer.
    """

    logprobs_N: Tensor
    squares_N: Tensor | None
    sums_A: Tensor
    sizes: tuple[int, ...]

    @property
    def sizes_A(self) -> Tensor:
        """The sizes in float64, at least 1."""
        return torch.tensor(self.sizes, dtype=torch.float64, device=self.sums_A.device).clamp(min=1)

    def sum_A(self, values_N: Tensor) -> Tensor:
        """Of each answer the sum over its tokens, in float64."""
        return _sum_up(values_N, self.sizes)


def answer_hidden(model: Decoder, batch: AnswerBatch) -> Tensor:
    """Hidden states [T, D] before the final norm."""
    device = model.device
    return model.hidden(batch.input_ids.to(device), Layout.branching(batch.bounds_E, batch.source_E.to(device)))


def score_answers(model: Decoder, batch: AnswerBatch, *, squares: bool = False) -> AnswerScores:
    """Log-probabilities of the answers given their prompts, from logits in fp32, differentiable."""
    device = model.device
    hidden_TD = answer_hidden(model, batch)
    inputs_ND, weight_VD = model.head_inputs(hidden_TD[batch.predictors_N.to(device)])
    targets_N, softcap = batch.predicted_N.to(device), model.spec.head.softcap
    squares_N = None
    if squares:
        logprobs_N, squares_N = kernels.token_logprobs_squares(inputs_ND, weight_VD, targets_N, softcap=softcap)
    else:
        logprobs_N = kernels.token_logprobs(inputs_ND, weight_VD, targets_N, softcap=softcap, precise=True)
    sizes = tuple(torch.bincount(batch.answers_N, minlength=batch.num_answers).tolist())
    return AnswerScores(logprobs_N, squares_N, _sum_up(logprobs_N, sizes), sizes)


def _sum_up(values_N: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Answer by answer: on a GPU index_add would add in another order each time."""
    return torch.stack([part.sum() for part in values_N.double().split(sizes)])
