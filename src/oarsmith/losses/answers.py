"""Log-probabilities of answers, and batches with some of their answers left out.

Shapes: T tokens of the batch, N predicted tokens, A answers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

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


def only(batch: AnswerBatch, keep_A: Tensor) -> AnswerBatch:
    """The batch with these answers (bool [A]) alone, and with the prompts that have one of them."""
    if bool(keep_A.all()):
        return batch
    sizes_A = torch.tensor(batch.bounds_E).diff()
    source_E = batch.source_E[keep_A.repeat_interleave(sizes_A)]
    used_T = torch.zeros(batch.num_tokens, dtype=torch.bool)
    used_T[source_E] = True
    new_T, new_A = used_T.cumsum(0) - 1, keep_A.cumsum(0) - 1
    keep_N = keep_A[batch.answers_N]
    predictors_N, predicted_N = new_T[batch.predictors_N[keep_N]], batch.predicted_N[keep_N]
    num_tokens = int(used_T.sum())
    kept_prompts, prompts_A = batch.prompts_A[keep_A].unique_consecutive(return_inverse=True)
    sizes = [int(used_T[batch.bounds[at] : batch.bounds[at + 1]].sum()) for at in kept_prompts.tolist()]
    keep_S = used_T[batch.step_ends_S]
    return replace(
        batch,
        input_ids=batch.input_ids[used_T],
        positions=batch.positions[used_T],
        bounds=(0, *accumulate(sizes)),
        targets=torch.zeros(num_tokens, dtype=torch.int64).index_copy_(0, predictors_N, predicted_N),
        weights=torch.zeros(num_tokens).index_add_(0, predictors_N, torch.ones(len(predictors_N))),
        num_tokens=num_tokens,
        num_trained=float(len(kept_prompts)),
        where=tuple(batch.where[at] for at in kept_prompts.tolist()),
        source_E=new_T[source_E],
        bounds_E=(0, *accumulate(sizes_A[keep_A].tolist())),
        predictors_N=predictors_N,
        predicted_N=predicted_N,
        answers_N=new_A[batch.answers_N[keep_N]],
        prompts_A=prompts_A,
        labels_A=batch.labels_A[keep_A],
        margins_A=batch.margins_A[keep_A],
        references_A=batch.references_A[keep_A],
        step_ends_S=new_T[batch.step_ends_S[keep_S]],
        step_labels_S=batch.step_labels_S[keep_S],
    )


def _sum_up(values_N: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Answer by answer: on a GPU index_add would add in another order each time."""
    return torch.stack([part.sum() for part in values_N.double().split(sizes)])
