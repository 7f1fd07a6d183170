"""Losses of sampled tokens: how a token's log-probability is pushed by its advantage.

Shapes: N sampled tokens of all answers, end to end. Every function gives a loss [N]; token t of answer a counts for all
of that answer's later weighting (``weights.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Level = Literal["token", "sequence", "sequence_sum"]


@dataclass(frozen=True, kw_only=True)
class SurrogateOptions:
    """What the losses below are told.

    Attributes:
        clip_low, clip_high: a ratio counts between 1 - low and 1 + high (DAPO's clip-higher where they differ).
        two_sided: the ratio is never taken for more than this, also where the advantage is negative (INTELLECT-2).
        dual_clip: c: for a negative advantage the loss is at most -c A (Ye et al. 2020).
        ceiling: cispo: the largest ratio that a token counts with.
        temperatures: sapo: of tokens with a positive and with a negative advantage.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    two_sided: float | None = None
    dual_clip: float | None = None
    ceiling: float = 5.0
    temperatures: tuple[float, float] = (1.0, 1.05)


@dataclass(frozen=True)
class Surrogate:
    """Losses of tokens, and which were cut: bool, below and above."""

    loss_N: Tensor
    low_N: Tensor
    high_N: Tensor


def log_ratios(logprobs_N: Tensor, old_N: Tensor, sizes: Sequence[int], level: Level) -> Tensor:
    """log p / p_old of each token [N]; by ``sequence`` their mean over the answer (GSPO, Zheng et al. 2025, equation
    7), by ``sequence_sum`` their sum (RLOO, Ahmadian et al. 2024).

    Args:
        sizes: tokens of each answer.
    """
    ratio_N = logprobs_N - old_N
    if level == "token":
        return ratio_N
    sizes_A = torch.tensor(list(sizes), device=ratio_N.device)
    sums = [part.sum() if level == "sequence_sum" else part.mean() for part in ratio_N.split(list(sizes)) if len(part)]
    return torch.stack(sums).repeat_interleave(sizes_A[sizes_A > 0])


def clipped(logprobs_N: Tensor, ratio_N: Tensor, advantages_N: Tensor, options: SurrogateOptions) -> Surrogate:
    """-min(r A, clip(r) A) (PPO, Schulman et al. 2017, equation 7), with a cap and a dual clip where they are given."""
    low, high = 1 - options.clip_low, 1 + options.clip_high
    first_N = ratio_N if options.two_sided is None else ratio_N.clamp(max=options.two_sided)
    loss_N = -torch.minimum(first_N * advantages_N, ratio_N.clamp(low, high) * advantages_N)
    if options.dual_clip is not None:
        loss_N = torch.where(advantages_N < 0, torch.minimum(loss_N, -options.dual_clip * advantages_N), loss_N)
    return Surrogate(loss_N, (ratio_N < low) & (advantages_N < 0), (ratio_N > high) & (advantages_N > 0))


def cispo(logprobs_N: Tensor, ratio_N: Tensor, advantages_N: Tensor, options: SurrogateOptions) -> Surrogate:
    """-sg(min(r, ceiling)) A log p: no token loses its gradient (MiniMax-M1, Chen et al. 2025, equation 5)."""
    weight_N = ratio_N.detach().clamp(max=options.ceiling)
    high_N = (ratio_N > options.ceiling) & (advantages_N > 0)
    return Surrogate(-weight_N * advantages_N * logprobs_N, torch.zeros_like(high_N), high_N)


def sapo(logprobs_N: Tensor, ratio_N: Tensor, advantages_N: Tensor, options: SurrogateOptions) -> Surrogate:
    """-4 / tau sigmoid(tau (r - 1)) A: a soft gate in place of the clip (Gao et al. 2025)."""
    positive, negative = options.temperatures
    tau_N = torch.where(advantages_N > 0, ratio_N.new_tensor(positive), ratio_N.new_tensor(negative))
    loss_N = -4 / tau_N * torch.sigmoid(tau_N * (ratio_N - 1)) * advantages_N
    nothing_N = torch.zeros_like(ratio_N, dtype=torch.bool)
    return Surrogate(loss_N, nothing_N, nothing_N)


def plain(logprobs_N: Tensor, ratio_N: Tensor, advantages_N: Tensor, options: SurrogateOptions) -> Surrogate:
    """-A log p (Williams 1992; GPG, Chu et al. 2025): nothing is compared with the policy that sampled."""
    nothing_N = torch.zeros_like(ratio_N, dtype=torch.bool)
    return Surrogate(-advantages_N * logprobs_N, nothing_N, nothing_N)


SURROGATES: dict[str, Callable[[Tensor, Tensor, Tensor, SurrogateOptions], Surrogate]] = {
    "clipped": clipped,
    "cispo": cispo,
    "sapo": sapo,
    "plain": plain,
}
