"""How AdaLoRA trains: its term of the loss, and which singular values stay (sections 3.2 and 3.3 of the paper).

The numbers are those of PEFT's RankAllocator, which are the authors'.

Shapes: I in features, O out features, r rank; stacked maps have a leading axis of experts, each a matrix of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from oarsmith.adapters.adalora import AdaLora, RankSchedule
from oarsmith.adapters.adapted import adapted_maps
from oarsmith.data.batch import Batch
from oarsmith.errors import CheckpointError
from oarsmith.models.decoder import Decoder
from oarsmith.training.objective import Objective, Outcome
from oarsmith.training.update_hooks import UpdateHooks


@dataclass(frozen=True)
class _Triplets:
    """The parameters of one projection by their names in the model."""

    prefix: str
    change: AdaLora
    a: nn.Parameter
    b: nn.Parameter
    e: nn.Parameter

    def parameters(self) -> dict[str, nn.Parameter]:
        return {f"{self.prefix}.lora_{letter}": p for letter, p in zip("ABE", (self.a, self.b, self.e), strict=True)}


def _triplets(model: Decoder) -> Iterator[_Triplets]:
    for path, module in adapted_maps(model):
        for segment, change in module.changes.items():
            if isinstance(change, AdaLora):
                found = (module.adapter[segment].get_parameter(f"lora_{letter}") for letter in "ABE")
                yield _Triplets(f"{path}.adapter.{segment}", change, *found)


@dataclass(frozen=True)
class WithOrthogonality:
    """An objective and, in training, weight * mean of ||A A^T - 1|| and ||B^T B - 1|| over all matrices (equation 4).

    The total that is logged stays the objective's own; ``sums`` has the term under ``orthogonality``.
    """

    inner: Objective

    def __call__(self, model: Decoder, batch: Batch, scale: float) -> Outcome:
        outcome = self.inner(model, batch, scale)
        if not model.training:
            return outcome
        term = orthogonality(model)
        # A step's loss has the term once, however many micro-batches share it.
        loss = outcome.loss + term * (scale * batch.num_trained)
        return replace(outcome, loss=loss, sums={**outcome.sums, "orthogonality": float(term.detach()) * outcome.count})


def orthogonality(model: Decoder) -> Tensor:
    """The term, weight and all."""
    norms, weight = [], 0.0
    for found in _triplets(model):
        weight = found.change.orth_weight
        for square in (found.a @ found.a.mT, found.b.mT @ found.b):
            off = square - torch.eye(square.shape[-1], device=square.device)
            norms.append(torch.linalg.matrix_norm(off).flatten())
    return weight * torch.cat(norms).mean()


class RankAllocation(UpdateHooks):
    """Scores every singular value with its vectors after each update, and gives up those that score least.

    A score is |weight * gradient|, averaged over steps, times how much that average has varied, also averaged; a
    singular value's own plus the means of its two vectors'.
    """

    def __init__(self, model: Decoder, schedule: RankSchedule) -> None:
        self._schedule = schedule
        self._all = list(_triplets(model))
        self._sensitivity = {n: torch.zeros_like(p.data) for found in self._all for n, p in found.parameters().items()}
        self._uncertainty = {name: torch.zeros_like(tensor) for name, tensor in self._sensitivity.items()}
        self._kept = {found.prefix: torch.ones_like(found.e.data, dtype=torch.uint8) for found in self._all}
        self._settled = torch.zeros((), dtype=torch.uint8)
        self._first = sum(found.e.numel() for found in self._all)
        matrices = sum(found.e.numel() // found.change.rank for found in self._all)
        self._target = matrices * self._all[0].change.target

    @torch.no_grad()
    def updated(self, grads: Mapping[str, Tensor], *, grad_scale: float, step: int) -> bool:
        schedule = self._schedule
        if self._settled:
            self._clear()
        elif step >= schedule.total - schedule.tfinal:
            self._allocate(self._target)
            self._settled.fill_(1)
            for tensor in (*self._sensitivity.values(), *self._uncertainty.values()):
                tensor.zero_()
        else:
            self._score(grads, grad_scale)
            budget, due = schedule.budget(step, self._first, self._target)
            if not due:
                return False
            self._allocate(budget)
        return True

    def _score(self, grads: Mapping[str, Tensor], grad_scale: float) -> None:
        for found in self._all:
            for name, parameter in found.parameters().items():
                now = (parameter.data * (grads[name] * grad_scale)).abs()
                average, varied = self._sensitivity[name], self._uncertainty[name]
                average.mul_(self._schedule.beta1).add_(now, alpha=1 - self._schedule.beta1)
                varied.mul_(self._schedule.beta2).add_((now - average).abs(), alpha=1 - self._schedule.beta2)

    def _allocate(self, budget: int) -> None:
        scores = {found.prefix: self._scores(found) for found in self._all}
        surplus = self._first - budget
        limit = -1.0
        if surplus > 0:
            limit = float(torch.cat([score.flatten() for score in scores.values()]).kthvalue(surplus).values)
        for found in self._all:
            self._kept[found.prefix].copy_(scores[found.prefix] > limit)
        self._clear()

    def _scores(self, found: _Triplets) -> Tensor:
        """[r, 1] or [E, r, 1]."""
        a, b, e = (self._sensitivity[name] * self._uncertainty[name] for name in found.parameters())
        return e + (a.mean(-1)[..., None] + b.mean(-2)[..., None])

    def _clear(self) -> None:
        for found in self._all:
            found.e.data.masked_fill_(self._kept[found.prefix] == 0, 0.0)

    def state_tensors(self) -> dict[str, Tensor]:
        return {
            "settled": self._settled,
            **{f"{name}/sensitivity": tensor for name, tensor in self._sensitivity.items()},
            **{f"{name}/uncertainty": tensor for name, tensor in self._uncertainty.items()},
            **{f"{name}/kept": tensor for name, tensor in self._kept.items()},
        }

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        own = self.state_tensors()
        odd = sorted(name for name in own.keys() | tensors if name not in own or name not in tensors)
        odd += [name for name, tensor in own.items() if not odd and tensors[name].shape != tensor.shape]
        if odd:
            raise CheckpointError(
                f"the state of adalora's ranks does not fit this model: {odd[0]}",
                fix="resume with the adapter keys of the first run",
            )
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
