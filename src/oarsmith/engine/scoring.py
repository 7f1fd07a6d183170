"""Scores of answers by a reward model: of conversations that end with one, and of judged rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from oarsmith.data.answers import Answered, make_answer_batch, of_like_length
from oarsmith.errors import ModelError
from oarsmith.losses.reward import answer_values
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
