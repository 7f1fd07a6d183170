"""Muon: momentum, orthogonalised. Shapes: E matrices side by side, O rows, I columns."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from oarsmith.training.optimizers.adamw import AdamWSettings
from oarsmith.training.optimizers.base import State
from oarsmith.training.optimizers.blocks import RowBlocks
from oarsmith.training.optimizers.matrices import MatrixOptimizer

# Keller Jordan, "Muon: An optimizer for hidden layers in neural networks" (2024).
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_EPS = 1e-7


@dataclass(frozen=True, kw_only=True)
class MuonSettings:
    """``products``: the dtype of the Newton-Schulz products; bf16 where the hardware has it, else fp32.

    ``others``: AdamW's settings for what is no matrix; its weight decay is Muon's too.
    """

    momentum: float = 0.95
    newton_schulz_steps: int = 5
    products: torch.dtype = torch.bfloat16
    others: AdamWSettings = field(default_factory=AdamWSettings)


def muon(
    parameters: Iterable[tuple[str, nn.Parameter]], settings: MuonSettings, blocks: Mapping[str, RowBlocks]
) -> MatrixOptimizer:
    """Muon (Jordan et al. 2024) for the matrices in ``blocks``, AdamW for the rest."""
    return MatrixOptimizer(parameters, MuonRule(settings), blocks, settings.others)


class MuonRule:
    """Nesterov momentum made orthogonal, times 0.2 sqrt(max(O, I)).

    The factor gives the update the RMS of AdamW's, so that one learning rate serves both (Liu et al. 2025, "Muon is
    Scalable for LLM Training", section 2.2).
    """

    def __init__(self, settings: MuonSettings) -> None:
        self.settings = settings

    def fresh(self, matrix: Tensor) -> State:
        return {"momentum": torch.zeros_like(matrix, dtype=torch.float32, memory_format=torch.contiguous_format)}

    def delta(self, key: str, grad: Tensor, state: State, lr: float, step: int) -> Tensor:
        settings, momentum = self.settings, state["momentum"]
        momentum.lerp_(grad, 1 - settings.momentum)
        direction = grad.lerp(momentum, settings.momentum)
        orthogonal = newton_schulz(direction, settings.newton_schulz_steps, settings.products)
        return orthogonal.float() * (lr * 0.2 * math.sqrt(max(grad.shape[-2:])))


def newton_schulz(matrix: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """U V^T of the singular value decomposition, with singular values between about 0.7 and 1.2 in place of 1.

    Takes [..., O, I] and gives ``dtype``. A matrix of zeros stays one.
    """
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.flatten(0, -3) if matrix.dim() > 2 else matrix[None]
    x = (x.mT if tall else x).to(dtype)
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(_EPS)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(matrix.shape)
