"""Estimates of KL(policy || reference) at sampled tokens (Schulman 2020, "Approximating KL divergence")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from oarsmith.losses.policy.surrogates import log_ratios

Estimator = Literal["k1", "abs", "k2", "k3"]

# verl's bounds: one token that the reference thinks impossible is not to decide about the step.
_MOST_LOG, _MOST = 20.0, 10.0


def estimate_kl(logprobs: Tensor, reference: Tensor, how: Estimator, *, bounded: bool = True) -> Tensor:
    """One value a token, of any shape.

    Args:
        how: ``k1``: log p - log q, unbiased, may be negative. ``abs``: its size. ``k2``: (log p - log q)^2 / 2. ``k3``:
            q / p - 1 - log(q / p), unbiased and never negative.
        bounded: k3: the log-ratio stays within 20 and the value within 10, as verl has it.
    """
    log_ratio = logprobs - reference
    if how == "k1":
        return log_ratio
    if how == "abs":
        return log_ratio.abs()
    if how == "k2":
        return 0.5 * log_ratio.square()
    backwards = -log_ratio
    if bounded:
        backwards = backwards.clamp(-_MOST_LOG, _MOST_LOG)
    value = backwards.exp() - backwards - 1
    return value.clamp(-_MOST, _MOST) if bounded else value


def corrected_kl(kl_N: Tensor, ratio_N: Tensor) -> Tensor:
    """r * KL: unbiased also where the tokens are those of an older policy (DeepSeek-V3.2, section 3.1)."""
    return kl_N * ratio_N


def sampling_correction(old_N: Tensor, sampled_N: Tensor, sizes: Sequence[int], how: str, most: float) -> Tensor:
    """Importance weights [N], without gradient, for tokens drawn by another implementation than the one that trains.

    Args:
        old_N, sampled_N: log-probabilities by the trainer and by the sampler, under the same weights.
        how: ``token_truncate``, ``token_mask``, ``sequence_truncate`` or ``sequence_mask``: the ratio of a token, or of
            its whole answer; cut at ``most``, or 0 above it.
    """
    level, _, rule = how.partition("_")
    assert level in ("token", "sequence") and rule in ("truncate", "mask"), how
    ratio_N = log_ratios(old_N, sampled_N, sizes, "sequence_sum" if level == "sequence" else "token")
    weight_N = ratio_N.detach().exp()
    return weight_N.clamp(max=most) if rule == "truncate" else torch.where(weight_N > most, 0.0, weight_N)
