"""Adafactor: second moments as the product of a row and a column."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from oarsmith.training.optimizers.adamw import AdamWSettings
from oarsmith.training.optimizers.base import State
from oarsmith.training.optimizers.blocks import RowBlocks
from oarsmith.training.optimizers.matrices import MatrixOptimizer


@dataclass(frozen=True, kw_only=True)
class AdafactorSettings:
    """``decay_rate`` c: the second moment's decay at step t is 1 - t^c. ``clip``: largest RMS of an update / lr.

    ``beta1``: decay of a first moment; None keeps none, which is what saves memory.
    """

    decay_rate: float = -0.8
    eps: float = 1e-30
    clip: float = 1.0
    beta1: float | None = None
    weight_decay: float = 0.0


def adafactor(
    parameters: Iterable[tuple[str, nn.Parameter]], settings: AdafactorSettings, fused: Mapping[str, RowBlocks]
) -> MatrixOptimizer:
    """Adafactor (Shazeer and Stern 2018) with the schedule's learning rate, for all parameters.

    ``fused``: those that hold several matrices, each of which is clipped and has columns of its own.
    """
    named = dict(parameters)
    blocks = {name: fused.get(name, RowBlocks(sizes=(len(parameter),))) for name, parameter in named.items()}
    others = AdamWSettings(weight_decay=settings.weight_decay)
    return MatrixOptimizer(named.items(), AdafactorRule(settings), blocks, others)


class AdafactorRule:
    """Algorithm 4 of the paper with a given step size in place of its relative one, and decoupled weight decay."""

    def __init__(self, settings: AdafactorSettings) -> None:
        self.settings = settings

    def fresh(self, matrix: Tensor) -> State:
        shape = matrix.shape
        shapes = {"row": shape[:-1], "column": (*shape[:-2], shape[-1])} if len(shape) > 1 else {"exp_avg_sq": shape}
        if self.settings.beta1 is not None:
            shapes["exp_avg"] = shape
        return {what: torch.zeros(size, device=matrix.device) for what, size in shapes.items()}

    def delta(self, key: str, grad: Tensor, state: State, lr: float, step: int) -> Tensor:
        settings = self.settings
        fresh_share = step**settings.decay_rate
        square = grad.square() + settings.eps
        if "row" in state:
            row, column = state["row"], state["column"]
            row.lerp_(square.mean(-1), fresh_share)
            column.lerp_(square.mean(-2), fresh_share)
            update = (row / row.mean(-1, keepdim=True)).rsqrt()[..., None] * column.rsqrt()[..., None, :] * grad
        else:
            state["exp_avg_sq"].lerp_(square, fresh_share)
            update = state["exp_avg_sq"].rsqrt() * grad
        axes = tuple(range(grad.dim()))[-2:]  # each expert is a matrix of its own
        rms = update.square().mean(axes, keepdim=True).sqrt()
        update *= lr / (rms / settings.clip).clamp_min(1.0)
        if settings.beta1 is not None:
            return state["exp_avg"].lerp_(update, 1 - settings.beta1).clone()
        return update
