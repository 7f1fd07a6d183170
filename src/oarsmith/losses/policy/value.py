"""The critic's loss. Shapes: N tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def value_loss(values_N: Tensor, old_N: Tensor, returns_N: Tensor, clip: float | None) -> tuple[Tensor, Tensor]:
    """0.5 max((V - R)^2, (V_clipped - R)^2) of each token, and which were cut.

    Args:
        old_N: values when the answers were sampled.
        clip: V_clipped is within this of the old value; None: nothing is clipped.
    """
    plain_N = (values_N - returns_N).square()
    if clip is None:
        return 0.5 * plain_N, torch.zeros_like(plain_N, dtype=torch.bool)
    near_N = torch.maximum(torch.minimum(values_N, old_N + clip), old_N - clip)
    clipped_N = (near_N - returns_N).square()
    return 0.5 * torch.maximum(plain_N, clipped_N), clipped_N > plain_N
