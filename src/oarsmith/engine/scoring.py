"""Scores of answers by a reward model, and of their steps by a model that judges these."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from oarsmith.data.answers import Answered, make_answer_batch, of_like_length
from oarsmith.errors import ModelError
from oarsmith.losses.reward import ProcessLoss, answer_values
from oarsmith.models.decoder import Decoder
from oarsmith.models.sharing import shares_beginnings

# Tokens that go through the decoder together.
_MOST_TOKENS = 4096


@torch.inference_mode()
def score_rows(model: Decoder, rows: Sequence[Answered]) -> list[tuple[float, ...]]:
    """The score of each row's answers, read at an answer's last token; a prompt is read once for its answers.

    Raises:
        ModelError: the model gives no score, or several.
    """
    if model.spec.head.num_scores != 1:
        found = model.spec.head.num_scores
        what = "the model writes text and gives no scores" if found is None else f"the model gives {found} scores"
        raise ModelError(what, fix="use a reward model, of one score (oarsmith reward)")
    share = shares_beginnings(model.spec)
    scores: list[tuple[float, ...]] = [()] * len(rows)
    for chosen in of_like_length(rows, share=share, capacity=_MOST_TOKENS):
        values = iter(answer_values(model, make_answer_batch([rows[index] for index in chosen], share=share)).tolist())
        for index in chosen:
            scores[index] = tuple(next(values) for _ in rows[index].answers)
    return scores


@torch.inference_mode()
def score_steps(model: Decoder, rows: Sequence[Answered], reward_tokens: tuple[int, int]) -> list[tuple[float, ...]]:
    """How good each step of each row's answer is, from 0 to 1: the softmax of the tokens for good and bad behind it.

    Raises:
        ModelError: the model scores whole answers.
    """
    if model.spec.head.num_scores is not None:
        raise ModelError("the model scores whole answers, not their steps", fix="use one trained with process_reward")
    loss, scores = ProcessLoss(reward_tokens=reward_tokens), list[tuple[float, ...]]([()] * len(rows))
    for chosen in of_like_length(rows, share=True, capacity=_MOST_TOKENS):
        logits_S2 = loss.logits(model, make_answer_batch([rows[index] for index in chosen]))
        good = iter(logits_S2.double().softmax(-1)[:, 0].tolist())
        for index in chosen:
            scores[index] = tuple(next(good) for _ in rows[index].step_ends)
    return scores
