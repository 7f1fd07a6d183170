"""One update: micro-batches forward and backward, one division by the global count, clipping, the optimizer."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oarsmith.data.batch import Batch
from oarsmith.errors import TrainingError
from oarsmith.models.decoder import Decoder
from oarsmith.training.objective import Objective
from oarsmith.training.optimizer import AdamW


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Sums over the step; the mean loss is ``total / count``."""

    total: float
    count: float
    sums: Mapping[str, float]
    grad_norm: float
    num_tokens: int


class NonFiniteError(TrainingError):
    """Loss or gradient is NaN or infinite; nothing has been updated."""


def seed_step(seed: int, purpose: str, step: int) -> None:
    """Key PyTorch's global generator (dropout) by (seed, purpose, step): a resumed run draws the same numbers."""
    torch.manual_seed(zlib.crc32(f"{seed}/{purpose}/{step}".encode()) + (seed << 32) % (1 << 62))


def run_step(
    model: Decoder,
    objective: Objective,
    batches: Sequence[Batch],
    optimizer: AdamW,
    *,
    lr: float,
    max_grad_norm: float,
) -> StepResult:
    """Forward, backward and update.

    Raises:
        NonFiniteError: the loss or the gradient norm is not finite; parameters are as before.
    """
    scale = 1.0 / sum(batch.num_trained for batch in batches)
    gradients = Gradients(model, wide=len(batches) > 1)
    total = count = 0.0
    sums: dict[str, float] = {}
    for batch in batches:
        outcome = objective(model, batch, scale)
        if not math.isfinite(outcome.total):
            gradients.clear()
            raise NonFiniteError(f"the loss is {outcome.total}")
        outcome.loss.backward()
        gradients.collect()
        total, count = total + outcome.total, count + outcome.count
        for name, value in outcome.sums.items():
            sums[name] = sums.get(name, 0.0) + value
    grads = gradients.result()
    norm = global_norm(grads.values())
    if not math.isfinite(norm):
        gradients.clear()
        raise NonFiniteError(f"the gradient norm is {norm}")
    clip = min(1.0, max_grad_norm / (norm + 1e-6)) if max_grad_norm > 0 else 1.0
    optimizer.step(grads, lr=lr, grad_scale=clip)
    gradients.clear()
    num_tokens = sum(batch.num_tokens for batch in batches)
    return StepResult(total=total, count=count, sums=sums, grad_norm=norm, num_tokens=num_tokens)


class Gradients:
    """Gradients of a step. With several micro-batches bf16 gradients add up in fp32, or small ones would be lost."""

    def __init__(self, model: Decoder, *, wide: bool) -> None:
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._wide: dict[str, Tensor] | None = {} if wide else None

    @torch.no_grad()
    def collect(self) -> None:
        """Take over what backward left in ``.grad``."""
        if self._wide is None:
            return
        for name, parameter in self._parameters.items():
            grad = parameter.grad
            if grad is None or grad.dtype == torch.float32:
                continue
            if name in self._wide:
                self._wide[name].add_(grad)
            else:
                self._wide[name] = grad.float()
            parameter.grad = None

    def result(self) -> dict[str, Tensor]:
        """One gradient per trainable parameter; zero where the loss does not reach it."""
        wide = self._wide or {}
        found = {}
        for name, parameter in self._parameters.items():
            grad = wide.get(name, parameter.grad)
            found[name] = torch.zeros_like(parameter) if grad is None else grad
        return found

    def clear(self) -> None:
        """Free everything."""
        for parameter in self._parameters.values():
            parameter.grad = None
        self._wide = None if self._wide is None else {}


def global_norm(grads: Iterable[Tensor]) -> float:
    """L2 norm over all gradients; each tensor's in fp32, their squares summed in fp64."""
    squares = [float(torch.linalg.vector_norm(g, dtype=torch.float32)) ** 2 for g in grads]
    return math.sqrt(sum(squares))
