"""Log-probabilities of the tokens that a policy wrote, at the temperature they were drawn at.

Shapes: T tokens of the batch, N tokens that the model wrote, V vocabulary, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from oarsmith import kernels
from oarsmith.data.answers import AnswerBatch
from oarsmith.losses.answers import answer_hidden
from oarsmith.models.decoder import Decoder

# Rows of logits at a time where entropies are wanted: 50 MB of them at V = 49,152.
_ROWS = 256


@dataclass(frozen=True)
class PolicyScores:
    """``logprobs_N``: fp32, differentiable. ``entropies_N``: of the distributions they were drawn from, if asked
    for."""

    logprobs_N: Tensor
    entropies_N: Tensor | None = None


def score_policy(
    model: Decoder, batch: AnswerBatch, *, temperature: float = 1.0, entropies: bool = False
) -> PolicyScores:
    """Of log softmax(logits / temperature)."""
    return score_hidden(model, answer_hidden(model, batch), batch, temperature=temperature, entropies=entropies)


def score_hidden(
    model: Decoder, hidden_TD: Tensor, batch: AnswerBatch, *, temperature: float, entropies: bool
) -> PolicyScores:
    """The same from states [T, D] that are there."""
    device = model.device
    inputs_ND, weight_VD = model.head_inputs(hidden_TD[batch.predictors_N.to(device)])
    targets_N, softcap = batch.predicted_N.to(device), model.spec.head.softcap
    if temperature != 1.0:
        # c tanh(x / c) / t is c/t tanh(x/t / (c/t)).
        inputs_ND, softcap = inputs_ND / temperature, None if softcap is None else softcap / temperature
    if entropies:
        return PolicyScores(*_with_entropies(inputs_ND, weight_VD, targets_N, softcap))
    wide = weight_VD.dtype != torch.float32
    return PolicyScores(kernels.token_logprobs(inputs_ND, weight_VD, targets_N, softcap=softcap, precise=wide))


def _with_entropies(
    inputs_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Both are differentiable; logits exist for some rows at a time, and again in the backward pass."""

    def part(inputs: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = (inputs @ weight.t()).float()
        if softcap is not None:
            logits = (logits / softcap).tanh() * softcap
        logprobs = logits.log_softmax(-1)
        return logprobs.gather(1, targets[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)

    found = [
        checkpoint(part, inputs, weight_VD, targets, use_reentrant=False)
        for inputs, targets in zip(inputs_ND.split(_ROWS), targets_N.split(_ROWS), strict=True)
    ]
    logprobs, entropies = zip(*found, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)
