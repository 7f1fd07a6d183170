"""One update: micro-batches forward and backward, one division by the global count, clipping, the optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from oarsmith.data.batch import Batch
from oarsmith.errors import TrainingError
from oarsmith.kernels import sum_of_squares
from oarsmith.models.decoder import Decoder
from oarsmith.training.objective import Objective, StepObjective, objective_of_step
from oarsmith.training.optimizer import Optimizer
from oarsmith.training.ranks import ALONE, Pass, Ranks, squares_of
from oarsmith.training.scaler import LossScaler
from oarsmith.training.seeds import seed_pass, seed_step
from oarsmith.training.update_hooks import UpdateHooks

__all__ = ["Gradients", "NonFiniteError", "StepResult", "global_norm", "run_step", "run_step_in_backward", "seed_step"]


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Sums over the step; the mean loss is ``total / count``.

    Attributes:
        grad_norm: of the mean loss's gradient before clipping; not finite in a skipped step.
        loss_scale: what the loss was multiplied with (fp16).
        skipped: gradients overflowed at this loss scale, so nothing was updated.
    """

    total: float
    count: float
    sums: Mapping[str, float]
    grad_norm: float
    num_tokens: int
    loss_scale: float = 1.0
    skipped: bool = False


class NonFiniteError(TrainingError):
    """Loss or gradient is NaN or infinite.

    Attributes:
        partly_updated: whether some parameters may have been updated; else none has been.
    """

    def __init__(self, what: str, *, partly_updated: bool = False) -> None:
        self.partly_updated = partly_updated
        super().__init__(what, fix="resume from the last checkpoint" if partly_updated else None)


def run_step(
    model: Decoder,
    objective: Objective,
    batches: Sequence[Batch],
    optimizer: Optimizer,
    *,
    lr: float,
    max_grad_norm: float,
    scaler: LossScaler | None = None,
    inspect: Callable[[StepResult], None] | None = None,
    hooks: UpdateHooks | None = None,
    number: int = 0,
    ranks: Ranks = ALONE,
) -> StepResult:
    """Forward, backward and update.

    Args:
        scaler: for fp16; told how the step went.
        inspect: called once loss and gradients are known and finite, before the update; what it raises ends the step.
        hooks: what a method does around the update, ``number`` of the run.
        ranks: who computes which of the batches; all processes know all of them.

    Raises:
        NonFiniteError: the loss is not finite, or without a scaler the gradient norm; parameters are as before.
        TrainingError: the loss scale has become too small.
    """
    loss_scale = 1.0 if scaler is None else scaler.scale
    passes = list(ranks.dealt(batches))
    gradients = Gradients(model, wide=len(batches) > 1, ranks=ranks)
    step_seed = torch.initial_seed()
    try:
        sums = _Sums()
        scale = 1.0 / sum(batch.num_trained for batch in batches)
        of_step = objective_of_step(objective, model, batches)
        for number_of_pass, one in enumerate(passes, start=1):
            seed_pass(step_seed, one.index)
            ranks.begin_pass(last=number_of_pass == len(passes))
            _backward(model, of_step, one, scale * loss_scale, sums, alone=ranks.alone)
        sums.add_up(ranks)
        grads = ranks.reduced(gradients.result())
        norm = math.sqrt(sum(ranks.squares(grads).tolist())) / loss_scale
        if not math.isfinite(norm):
            if scaler is None:
                raise NonFiniteError(f"the gradient norm is {norm}")
            scaler.update(overflowed=True)
            return sums.result(norm, loss_scale=loss_scale, skipped=True)
        result = sums.result(norm, loss_scale=loss_scale)
        if inspect is not None:
            inspect(result)
        clip = min(1.0, max_grad_norm / (norm + 1e-6)) if max_grad_norm > 0 else 1.0
        optimizer.step(grads if hooks is None else hooks.adjusted(grads), lr=lr, grad_scale=clip / loss_scale)
        if hooks is not None and hooks.updated(grads, grad_scale=clip / loss_scale, step=number):
            optimizer.adopt_weights()
        sums.tell(objective)
    finally:
        gradients.clear()
    if scaler is not None:
        scaler.update(overflowed=False)
    return result


def run_step_in_backward(
    model: Decoder, objective: Objective, batch: Batch, optimizer: Optimizer, *, lr: float
) -> StepResult:
    """Forward and backward; each parameter is updated as soon as its gradient is known, and the gradient freed.

    No two gradients are alive at a time, so there is no clipping by their norm and no adding up over micro-batches. The
    numbers are those of :func:`run_step` without clipping. A parameter's last use in backward is the one that completes
    its gradient, so no product sees a weight that is too new.

    Raises:
        NonFiniteError: of the loss, and nothing has been updated; or of a gradient, and it has not been applied, but
            parameters of later layers have been updated.
    """
    sums, squares = _Sums(), dict[str, float]()

    def update(name: str, parameter: Tensor) -> None:
        grad, parameter.grad = parameter.grad, None
        assert grad is not None, name
        squares[name] = float(sum_of_squares(grad))
        if not math.isfinite(squares[name]):
            raise NonFiniteError(
                f"the gradient of {name} is not finite; parameters of later layers may have been updated",
                partly_updated=True,
            )
        optimizer.update(name, grad, lr=optimizer.rate(name, lr), grad_scale=1.0, step=optimizer.step_count + 1)

    hooks = [p.register_post_accumulate_grad_hook(partial(update, name)) for name, p in optimizer.parameters.items()]
    try:
        _backward(model, objective, Pass(0, batch, counts=True), 1.0 / batch.num_trained, sums, alone=True)
    finally:
        for hook in hooks:
            hook.remove()
    for name, parameter in optimizer.parameters.items():
        if name not in squares:
            optimizer.update(
                name, _nothing(parameter), lr=optimizer.rate(name, lr), grad_scale=1.0, step=optimizer.step_count + 1
            )
    optimizer.step_count += 1
    sums.tell(objective)
    return sums.result(math.sqrt(sum(squares.get(name, 0.0) for name in optimizer.parameters)))


class _Sums:
    """What micro-batches add up to."""

    def __init__(self) -> None:
        self.total = self.count = 0.0
        self.sums: dict[str, float] = {}
        self.num_tokens = 0

    def add_up(self, ranks: Ranks) -> None:
        """Take in the passes of other processes.

        Raises:
            NonFiniteError: the loss is not finite.
        """
        if ranks.alone:
            return
        names = sorted(self.sums)
        found = ranks.total([self.total, self.count, float(self.num_tokens), *(self.sums[name] for name in names)])
        self.total, self.count, self.num_tokens = found[0], found[1], int(found[2])
        self.sums = dict(zip(names, found[3:], strict=True))
        if not math.isfinite(self.total):
            raise NonFiniteError(f"the loss is {self.total}")

    def tell(self, objective: Objective) -> None:
        """The step has been applied."""
        if isinstance(objective, StepObjective):
            objective.note(self.sums, self.count)

    def result(self, norm: float, *, loss_scale: float = 1.0, skipped: bool = False) -> StepResult:
        return StepResult(
            total=self.total,
            count=self.count,
            sums=self.sums,
            grad_norm=norm,
            num_tokens=self.num_tokens,
            loss_scale=loss_scale,
            skipped=skipped,
        )


def _backward(model: Decoder, objective: Objective, one: Pass, scale: float, sums: _Sums, *, alone: bool) -> None:
    """One micro-batch. The scale goes through the objective: it may compute gradients in its forward pass.

    A loss that is not finite ends it at once, unless others would wait for this process's gradients.
    """
    outcome = objective(model, one.batch, scale if one.counts else 0.0)
    if alone and not math.isfinite(outcome.total):
        raise NonFiniteError(f"the loss is {outcome.total}")
    outcome.loss.backward()
    counted = 1.0 if one.counts else 0.0
    sums.total, sums.count = sums.total + counted * outcome.total, sums.count + counted * outcome.count
    sums.num_tokens += one.batch.num_tokens if one.counts else 0
    for name, value in outcome.sums.items():
        sums.sums[name] = sums.sums.get(name, 0.0) + counted * value


class Gradients:
    """Gradients of a step, from now until :meth:`clear`.

    With several micro-batches (``wide``) 16-bit gradients add up in fp32, or small ones would be lost. Each is taken
    over as soon as backward has it, so they never all exist in both formats.
    """

    def __init__(self, model: Decoder, *, wide: bool, ranks: Ranks = ALONE) -> None:
        self._ranks = ranks
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._wide: dict[str, Tensor] = {}
        narrow = {name: p for name, p in self._parameters.items() if wide and p.dtype != torch.float32}
        self._hooks = [p.register_post_accumulate_grad_hook(partial(self._widen, name)) for name, p in narrow.items()]

    @torch.no_grad()
    def _widen(self, name: str, parameter: Tensor) -> None:
        grad, parameter.grad = parameter.grad, None
        assert grad is not None, name
        grad = self._ranks.local(grad)
        if name in self._wide:
            self._wide[name].add_(grad)
        else:
            self._wide[name] = grad.float()

    def result(self) -> dict[str, Tensor]:
        """One gradient per trainable parameter, of what lies here; zero where the loss does not reach it."""
        found, local = {}, self._ranks.local
        for name, parameter in self._parameters.items():
            grad = self._wide.get(name, parameter.grad)
            found[name] = _nothing(local(parameter)) if grad is None else local(grad)
        return found

    def clear(self) -> None:
        """Free everything."""
        for hook in self._hooks:
            hook.remove()
        for parameter in self._parameters.values():
            parameter.grad = None
        self._wide = {}


def _nothing(parameter: Tensor) -> Tensor:
    """Zeros of a parameter's shape that take no memory."""
    return parameter.new_zeros(()).expand_as(parameter)


def global_norm(grads: Iterable[Tensor]) -> float:
    """L2 norm over all gradients; each tensor's in fp32, their squares summed in fp64."""
    return math.sqrt(sum(squares_of(grads).tolist()))
