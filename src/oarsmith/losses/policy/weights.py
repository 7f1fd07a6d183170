"""What each sampled token counts for in the step's mean, and what the mean is divided by.

A loss is sum_t w_t l_t / count over the whole step. The rules differ in w and count alone, so that a step is the same
however it is split into passes. Shapes: N sampled tokens, A answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]


def token_weights(
    how: Aggregation, sizes: Sequence[int], *, kept: Sequence[bool] | None = None, longest: int = 1
) -> tuple[Tensor, float]:
    """Weights float32 [N] of the tokens of answers, and the count of these answers.

    Args:
        how: ``token-mean``: every token alike (DAPO, Yu et al. 2025). ``seq-mean-token-mean``: every answer alike
            (GRPO, Shao et al. 2024). ``seq-mean-token-sum``: the mean over answers of sums.
            ``seq-mean-token-sum-norm``: the same divided by the longest answer that could be (Dr. GRPO, Liu et al.
            2025).
        sizes: tokens of each answer.
        kept: answers that count at all (DAPO's overlong filtering leaves those out that ended at the limit); they stay
            in the count of answers.
        longest: the limit of an answer's length.
    """
    used = [True] * len(sizes) if kept is None else list(kept)
    assert len(used) == len(sizes), (len(used), len(sizes))
    each = [
        float(use) / (size if how == "seq-mean-token-mean" else 1) if size else 0.0
        for use, size in zip(used, sizes, strict=True)
    ]
    weights_N = torch.tensor(each, dtype=torch.float32).repeat_interleave(torch.tensor(list(sizes), dtype=torch.int64))
    num_used = sum(size for use, size in zip(used, sizes, strict=True) if use)
    return weights_N, count_of(how, num_used, len(sizes), longest)


def count_of(how: Aggregation, num_used: int, num_answers: int, longest: int) -> float:
    """What weighted losses are divided by: of ``num_answers`` answers, ``num_used`` of whose tokens have a weight."""
    if how == "token-mean":
        return float(num_used)
    return float(num_answers * (longest if how == "seq-mean-token-sum-norm" else 1))


def weighted_sums(values: Mapping[str, Tensor], weights_N: Tensor, count: float) -> dict[str, float]:
    """Weighted means of values [N], as a step adds them up: times the ``count`` that it divides by in the end.

    What a step's mean is of differs with the rule; metrics are means under the same weights in any case.
    """
    share = count / max(float(weights_N.sum()), 1e-12)
    totals = torch.stack([(each.detach() * weights_N).sum() for each in values.values()]).tolist()
    return {name: total * share for name, total in zip(values, totals, strict=True)}
