"""Reward models: scores of whole answers learnt from pairs (Bradley and Terry 1952), and of their steps.

Shapes: T tokens, E tokens of the whole documents, P pairs, A answers (chosen and rejected in turn), S judged steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from oarsmith.data.answers import AnswerBatch
from oarsmith.data.batch import Batch
from oarsmith.losses.answers import answer_hidden
from oarsmith.models.decoder import Decoder
from oarsmith.training.objective import Objective, Outcome, StepObjective


@dataclass(frozen=True, kw_only=True)
class RewardOptions:
    """What the loss of a pair has besides values.

    Attributes:
        kind: where values are compared: at the answers' last tokens, or at every token from the first one in which they
            differ (safe-rlhf, Dai et al. 2023).
        label_smoothing: the probability that a pair is the wrong way round.
        center: weight of the squared sum of both values, which keeps them around 0 (Eisenstein et al. 2023).
        square: weight of the mean of both values' squares (PaddleNLP's ``regularization``).
    """

    kind: Literal["sequence-wise", "token-wise"] = "sequence-wise"
    label_smoothing: float = 0.0
    center: float = 0.0
    square: float = 0.0


def compare(chosen: Tensor, rejected: Tensor, margins: Tensor, options: RewardOptions) -> Tensor:
    """-log s(chosen - rejected - margin) of values of any one shape, with what regularises them."""
    z = chosen - rejected - margins
    loss = -logsigmoid(z) + options.label_smoothing * z
    if options.center > 0:
        loss = loss + options.center * (chosen + rejected).square()
    if options.square > 0:
        loss = loss + options.square * 0.5 * (chosen.square() + rejected.square())
    return loss


def token_wise(
    chosen: Sequence[Tensor], rejected: Sequence[Tensor], starts: Sequence[int], margins: Tensor, options: RewardOptions
) -> Tensor:
    """[P] mean over tokens of what values are compared at.

    Args:
        chosen, rejected: of each pair the values along the answers.
        starts: the first index at which their tokens differ.

    A shorter answer keeps its last value to the end of the longer one; safe-rlhf compares with what its model makes of
    padding there.
    """
    losses = []
    for first, second, start, margin in zip(chosen, rejected, starts, margins, strict=True):
        places = torch.arange(start, max(len(first), len(second)), device=first.device)
        left, right = first[places.clamp(max=len(first) - 1)], second[places.clamp(max=len(second) - 1)]
        losses.append(compare(left, right, margin, options).mean())
    return torch.stack(losses)


def steps_loss(logits_S2: Tensor, labels_S: Tensor) -> Tensor:
    """[S] cross-entropy of a choice between two tokens, good and bad; labels are the probability of good, 0 to 1."""
    log_p = torch.log_softmax(logits_S2.double(), -1)
    return -(labels_S * log_p[:, 0] + (1 - labels_S) * log_p[:, 1])


def answer_values(model: Decoder, batch: AnswerBatch) -> Tensor:
    """[A] values of answers, in fp32, by a model with one score."""
    last_A = torch.tensor(batch.bounds_E[1:]) - 1
    return model.scores(answer_hidden(model, batch)[batch.source_E[last_A].to(model.device)])[:, 0]


@dataclass(frozen=True, kw_only=True)
class RewardLoss:
    """Mean over pairs, of a model with one score. Batches are ``AnswerBatch`` with two answers a prompt, the chosen one
    first."""

    options: RewardOptions = RewardOptions()

    def __call__(self, model: Decoder, batch: Batch, scale: float) -> Outcome:
        assert isinstance(batch, AnswerBatch) and batch.num_answers == 2 * len(batch.where), "two answers a prompt"
        device = model.device
        margins_P = batch.margins_A[0::2].to(device)
        if self.options.kind == "sequence-wise":
            values_A = answer_values(model, batch).double()
            losses = compare(values_A[0::2], values_A[1::2], margins_P, self.options)
        else:
            values_E = model.scores(answer_hidden(model, batch))[:, 0].double()[batch.source_E.to(device)]
            along = values_E.split(torch.tensor(batch.bounds_E).diff().tolist())
            values_A = torch.stack([values[-1] for values in along])
            losses = token_wise(along[0::2], along[1::2], first_differences(batch), margins_P, self.options)
        total = losses.sum()
        chosen, rejected = values_A.detach()[0::2], values_A.detach()[1::2]
        sums = {
            "accuracy": float((chosen > rejected).sum()),
            "margin": float((chosen - rejected).sum()),
            "rewards_chosen": float(chosen.sum()),
            "rewards_rejected": float(rejected.sum()),
        }
        return Outcome(loss=total * scale, total=float(total.detach()), count=batch.num_trained, sums=sums)


def first_differences(batch: AnswerBatch) -> list[int]:
    """Of each pair the index, in prompt and answer, of the first token that differs; where one answer begins the other,
    the last of the shorter."""
    ids_E = batch.input_ids[batch.source_E]
    documents = ids_E.split(torch.tensor(batch.bounds_E).diff().tolist())
    found = []
    for first, second in zip(documents[0::2], documents[1::2], strict=True):
        both = min(len(first), len(second))
        differ = (first[:both] != second[:both]).nonzero()
        found.append(int(differ[0]) if len(differ) > 0 else both - 1)
    return found


@dataclass(frozen=True, kw_only=True)
class ProcessLoss(StepObjective):
    """Mean over the step's judged steps of answers: at the token that ends one, which of two tokens is the likelier.

    Math-Shepherd (Wang et al. 2023); the logits are those at the ending token itself, of the two tokens alone. Batches
    are ``AnswerBatch`` with ``step_ends_S`` and ``step_labels_S``.

    Args:
        reward_tokens: ids of the tokens for good and bad.
    """

    reward_tokens: tuple[int, int]

    def of_step(self, model: Decoder, batches: Sequence[Batch]) -> Objective:
        """Counts alone are of the whole step."""
        ends = 0
        for batch in batches:
            assert isinstance(batch, AnswerBatch), type(batch)
            ends += len(batch.step_ends_S)
        assert ends > 0, "no judged step"
        return _ProcessOfStep(self.reward_tokens, sum(batch.num_trained for batch in batches) / ends)

    def logits(self, model: Decoder, batch: AnswerBatch) -> Tensor:
        """[S, 2] in fp32, of good and bad."""
        return _choice_logits(model, batch, self.reward_tokens)


@dataclass(frozen=True)
class _ProcessOfStep:
    """``share``: prompts of the step for each of its judged steps."""

    reward_tokens: tuple[int, int]
    share: float

    def __call__(self, model: Decoder, batch: Batch, scale: float) -> Outcome:
        assert isinstance(batch, AnswerBatch), type(batch)
        logits_S2, labels_S = _choice_logits(model, batch, self.reward_tokens), batch.step_labels_S.to(model.device)
        total = self.share * steps_loss(logits_S2, labels_S).sum()
        right = ((logits_S2[:, 0] > logits_S2[:, 1]) == (labels_S > 0.5)).sum()
        sums = {"accuracy": self.share * float(right)}
        return Outcome(loss=total * scale, total=float(total.detach()), count=batch.num_trained, sums=sums)


def _choice_logits(model: Decoder, batch: AnswerBatch, tokens: tuple[int, int]) -> Tensor:
    hidden_TD = answer_hidden(model, batch)
    inputs_SD, weight_VD = model.head_inputs(hidden_TD[batch.step_ends_S.to(model.device)])
    return model.head.bend(inputs_SD.float() @ weight_VD[list(tokens)].float().t())
