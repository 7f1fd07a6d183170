"""A step looked at layer by layer: what went through each part, its gradients and its weights.

Nothing of it costs a normal step: the step is run again, with hooks, once something has been noticed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from oarsmith.data.batch import Batch
from oarsmith.models.decoder import Decoder
from oarsmith.training.objective import Objective, objective_of_step
from oarsmith.training.seeds import seed_pass
from oarsmith.training.step import global_norm


@dataclass
class Summary:
    """Mean, deviation, norm and largest size of the finite elements of some tensors; how many are not finite."""

    elements: int = 0
    not_finite: int = 0
    absmax: float = 0.0
    _sum: float = field(default=0.0, repr=False)
    _squares: float = field(default=0.0, repr=False)

    def add(self, tensor: Tensor) -> None:
        """Take in one more tensor."""
        values = tensor.detach().flatten()
        finite = torch.isfinite(values)
        self.elements += values.numel()
        if not bool(finite.all()):
            values = values[finite]
            self.not_finite += int((~finite).sum())
        if values.numel() > 0:
            self.absmax = max(self.absmax, float(values.abs().max()))
            self._sum += float(values.sum(dtype=torch.float64))
            self._squares += float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2

    @property
    def mean(self) -> float:
        return self._sum / max(self.elements - self.not_finite, 1)

    @property
    def std(self) -> float:
        count = max(self.elements - self.not_finite, 1)
        return math.sqrt(max(self._squares / count - self.mean**2, 0.0))

    @property
    def norm(self) -> float:
        return math.sqrt(self._squares)

    def to_dict(self) -> dict[str, float | int]:
        """All of it as plain JSON values."""
        return {
            "mean": self.mean,
            "std": self.std,
            "norm": self.norm,
            "absmax": self.absmax,
            "not_finite": self.not_finite,
            "elements": self.elements,
        }


@dataclass(frozen=True, kw_only=True)
class StepStatistics:
    """A step without its update.

    Attributes:
        loss: mean over all trained tokens; ``losses``: that of each micro-batch.
        grad_norm: L2 norm over all gradients of the mean loss.
        forward: outputs of the parts, in the order they run.
        gradients: of the parameters that train (of the mean loss times the loss scale); ``weights``: of all.
    """

    loss: float
    losses: tuple[float, ...]
    grad_norm: float
    forward: Mapping[str, Summary]
    gradients: Mapping[str, Summary]
    weights: Mapping[str, Summary]

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    def first_not_finite(self) -> str | None:
        """Where the trouble starts: a weight, else the first part forwards, the loss, the first gradient backwards."""
        for what, summaries in (("weight", self.weights), ("output of", self.forward)):
            for name, summary in summaries.items():
                if summary.not_finite:
                    return f"{what} {name}"
        if not math.isfinite(self.loss):
            return "the loss"
        for name, summary in reversed(list(self.gradients.items())):
            if summary.not_finite:
                return f"gradient of {name}"
        return None

    def to_dict(self) -> dict[str, Any]:
        groups = {"forward": self.forward, "gradients": self.gradients, "weights": self.weights}
        return {name: {key: s.to_dict() for key, s in group.items()} for name, group in groups.items()}


def measure_step(
    model: Decoder, objective: Objective, batches: Sequence[Batch], *, loss_scale: float = 1.0
) -> StepStatistics:
    """Forward and backward of a step as ``run_step`` does them, with the same sums in the same order.

    Gradients that other code holds in ``.grad`` are left alone. Random numbers come from the global generator, which
    the caller sets.
    """
    scale = loss_scale / sum(batch.num_trained for batch in batches)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads: dict[str, Tensor] = {}
    totals, count = [], 0.0
    forward: dict[str, Summary] = {}
    of_step, step_seed = objective_of_step(objective, model, batches), torch.initial_seed()
    for index, batch in enumerate(batches):
        seed_pass(step_seed, index)
        with _watched(model, forward):
            outcome = of_step(model, batch, scale)
        totals.append((outcome.total, outcome.count))
        count += outcome.count
        new = torch.autograd.grad(outcome.loss, list(parameters.values()), allow_unused=True)
        _add_up(grads, dict(zip(parameters, new, strict=True)), wide=len(batches) > 1)
    summaries = {name: _summary(grads[name] if name in grads else torch.zeros(1)) for name in parameters}
    return StepStatistics(
        loss=sum(total for total, _ in totals) / count,
        losses=tuple(total / part for total, part in totals),
        grad_norm=global_norm(grads.values()) / loss_scale,
        forward=forward,
        gradients=summaries,
        weights={name: _summary(p) for name, p in model.named_parameters()},
    )


def _add_up(grads: dict[str, Tensor], new: Mapping[str, Tensor | None], *, wide: bool) -> None:
    """As ``step.Gradients`` does: over several micro-batches in fp32."""
    for name, grad in new.items():
        if grad is None:
            continue
        if name in grads:
            grads[name] = grads[name].add(grad)
        else:
            grads[name] = grad.float() if wide else grad


@contextmanager
def _watched(model: Decoder, found: dict[str, Summary]) -> Iterator[None]:
    """Collect what the parts give in a forward pass; not what backward computes again."""
    names = ["embedding"]
    for index in range(len(model.layers)):
        names += [f"layers.{index}.attention", f"layers.{index}.ffn", f"layers.{index}"]
    names += ["final_norm"] if model.final_norm is not None else []

    tokens = 0

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            nonlocal tokens
            if name == "embedding":
                tokens = len(output)
            # The layers get rows more that nobody reads (see ``Decoder.hidden``).
            found.setdefault(name, Summary()).add(output[:tokens] if name.startswith("layers.") else output)

        # A compiled part runs as it does in training, and is looked at from outside.
        return model.get_submodule(name).register_forward_hook(torch.compiler.disable(hook))

    handles = [watch(name) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _summary(tensor: Tensor) -> Summary:
    summary = Summary()
    summary.add(tensor)
    return summary
