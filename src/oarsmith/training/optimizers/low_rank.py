"""GaLore and APOLLO: Adam's moments in a low-rank projection of the gradient.

Shapes: E matrices side by side, O rows, I columns, R the rank. The shorter side of a matrix is projected.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from oarsmith.training.optimizers.adamw import AdamWSettings
from oarsmith.training.optimizers.base import State
from oarsmith.training.optimizers.blocks import RowBlocks
from oarsmith.training.optimizers.matrices import MatrixOptimizer
from oarsmith.training.seeds import keyed_seed

# How much an APOLLO update may grow from one step to the next (Fira's limiter; Chen et al. 2024, section 4.2).
_GROWTH = 1.01


@dataclass(frozen=True, kw_only=True)
class GaLoreSettings:
    """``steps``: updates between new projections. ``scale``: factor on the update. ``adam``: betas, eps and decay."""

    rank: int = 128
    steps: int = 200
    scale: float = 0.25
    adam: AdamWSettings = field(default_factory=AdamWSettings)


@dataclass(frozen=True, kw_only=True)
class ApolloSettings:
    """As :class:`GaLoreSettings`. ``scaling``: one factor for each channel, or (APOLLO-Mini) one for the matrix.

    The authors run APOLLO with a quarter of the hidden size as rank and scale 1, APOLLO-Mini with rank 1, tensor-wise
    scaling and scale sqrt(128).
    """

    rank: int = 128
    steps: int = 200
    scale: float = 1.0
    scaling: Literal["channel", "tensor"] = "channel"
    seed: int = 42
    adam: AdamWSettings = field(default_factory=AdamWSettings)


def galore(
    parameters: Iterable[tuple[str, nn.Parameter]], settings: GaLoreSettings, blocks: Mapping[str, RowBlocks]
) -> MatrixOptimizer:
    """GaLore (Zhao et al. 2024) for the matrices in ``blocks``, AdamW for the rest."""
    return MatrixOptimizer(parameters, GaLoreRule(settings), blocks, settings.adam)


def apollo(
    parameters: Iterable[tuple[str, nn.Parameter]], settings: ApolloSettings, blocks: Mapping[str, RowBlocks]
) -> MatrixOptimizer:
    """APOLLO or APOLLO-Mini (Zhu et al. 2024) for the matrices in ``blocks``, AdamW for the rest."""
    return MatrixOptimizer(parameters, ApolloRule(settings), blocks, settings.adam)


class GaLoreRule:
    """Algorithm 2 of the paper: Adam on P^T G (or G P), taken back by P, the first singular vectors of a gradient."""

    def __init__(self, settings: GaLoreSettings) -> None:
        self.settings = settings

    def fresh(self, matrix: Tensor) -> State:
        short = min(matrix.shape[-2:])
        shape = (*matrix.shape[:-2], short, min(self.settings.rank, short))
        return _moments(matrix, self.settings.rank) | {"projection": torch.zeros(shape, device=matrix.device)}

    def delta(self, key: str, grad: Tensor, state: State, lr: float, step: int) -> Tensor:
        tall, projection = _tall(grad), state["projection"]
        if (step - 1) % self.settings.steps == 0:
            u, _, vh = torch.linalg.svd(grad, full_matrices=False)
            projection.copy_((vh.mT if tall else u)[..., : projection.shape[-1]])
        normed = _adam(grad @ projection if tall else projection.mT @ grad, state, self.settings.adam)
        back = normed @ projection.mT if tall else projection @ normed
        return back * (lr * self.settings.scale * _bias_correction(self.settings.adam, step))


class ApolloRule:
    """Algorithm 1 of the paper: the gradient, scaled as Adam would scale its random projection.

    The projection is drawn anew in each step, from (seed, matrix, refresh), and never stored. Order of the limiter and
    of the bias correction as in the authors' code. A matrix without a gradient so far has no norm to grow from.
    """

    def __init__(self, settings: ApolloSettings) -> None:
        self.settings = settings

    def fresh(self, matrix: Tensor) -> State:
        norm = torch.zeros((*matrix.shape[:-2], 1, 1), device=matrix.device)
        return _moments(matrix, self.settings.rank) | {"norm": norm}

    def delta(self, key: str, grad: Tensor, state: State, lr: float, step: int) -> Tensor:
        settings, tall = self.settings, _tall(grad)
        projection = self._projection(key, grad, (step - 1) // settings.steps)
        low = grad @ projection if tall else projection.mT @ grad
        normed = _adam(low, state, settings.adam)
        axes = (-2, -1) if settings.scaling == "tensor" else (-1 if tall else -2,)
        factor = _norm(normed, axes) / (_norm(low, axes) + 1e-8)
        scaled = grad * factor
        norm, before = _norm(scaled, (-2, -1)), state["norm"]
        limiter = torch.where(before > 0, (norm / (before + 1e-8)).clamp_min(_GROWTH) / _GROWTH, 1.0)
        before.copy_(norm / limiter)
        return scaled * (lr * settings.scale * _bias_correction(settings.adam, step) / limiter)

    def _projection(self, key: str, grad: Tensor, index: int) -> Tensor:
        """[..., short side, R] from N(0, 1 / R), drawn on the CPU: the same numbers on every device."""
        short = min(grad.shape[-2:])
        rank = min(self.settings.rank, short)
        generator = torch.Generator().manual_seed(keyed_seed(self.settings.seed, f"apollo/{key}", index))
        drawn = torch.randn((*grad.shape[:-2], short, rank), generator=generator)
        return drawn.to(grad.device) / math.sqrt(rank)


def _tall(matrix: Tensor) -> bool:
    return matrix.shape[-2] >= matrix.shape[-1]


def _norm(matrix: Tensor, axes: tuple[int, ...]) -> Tensor:
    return torch.linalg.vector_norm(matrix, dim=axes, keepdim=True)


def _moments(matrix: Tensor, rank: int) -> State:
    """Of the projected gradient: [..., O, R] of a tall matrix, [..., R, I] of a wide one."""
    *lead, rows, columns = matrix.shape
    rank = min(rank, rows, columns)
    shape = (*lead, rows, rank) if _tall(matrix) else (*lead, rank, columns)
    return {what: torch.zeros(shape, device=matrix.device) for what in ("exp_avg", "exp_avg_sq")}


def _adam(grad: Tensor, state: State, settings: AdamWSettings) -> Tensor:
    """Adam's direction without the bias correction."""
    state["exp_avg"].lerp_(grad, 1 - settings.beta1)
    state["exp_avg_sq"].mul_(settings.beta2).addcmul_(grad, grad, value=1 - settings.beta2)
    return state["exp_avg"] / (state["exp_avg_sq"].sqrt() + settings.eps)


def _bias_correction(settings: AdamWSettings, step: int) -> float:
    return math.sqrt(1 - settings.beta2**step) / (1 - settings.beta1**step)
