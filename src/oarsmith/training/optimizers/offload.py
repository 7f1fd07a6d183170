"""Optimizer state in host memory for weights on an accelerator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from oarsmith.training.optimizers.base import Optimizer

Named = Iterable[tuple[str, nn.Parameter]]


class Offloaded(Optimizer):
    """Runs any optimizer on copies of the parameters in host memory, where its state is.

    A gradient goes to the host, the CPU's kernels update the copy there, and the new weight comes back. The accelerator
    holds weights and gradients only.

    Args:
        build: makes the optimizer of the copies.
    """

    def __init__(self, parameters: Named, build: Callable[[Named], Optimizer]) -> None:
        super().__init__(parameters)
        self._twins = {name: nn.Parameter(_to_host(p.detach())) for name, p in self.parameters.items()}
        self._inner = build(self._twins.items())
        self._state = self._inner._state

    @torch.no_grad()
    def update(self, name: str, grad: Tensor, *, lr: float, grad_scale: float, step: int) -> None:
        self._inner.update(name, grad.cpu(), lr=lr, grad_scale=grad_scale, step=step)
        self.parameters[name].data.copy_(self._twins[name])

    def master(self, name: str) -> Tensor:
        return self._inner.master(name)

    @torch.no_grad()
    def adopt_weights(self) -> None:
        self._copy_weights()
        self._inner.adopt_weights()

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor], step_count: int) -> None:
        super().load_state(tensors, step_count)
        self._copy_weights()

    def _copy_weights(self) -> None:
        for name, parameter in self.parameters.items():
            self._twins[name].copy_(parameter)


def offloaded(parameters: Named, build: Callable[[Named], Optimizer]) -> Optimizer:
    """An :class:`Offloaded` optimizer, or the plain one where all parameters lie in host memory already."""
    named = dict(parameters)
    if all(parameter.device.type == "cpu" for parameter in named.values()):
        return build(named.items())
    return Offloaded(named.items(), build)


def _to_host(weight: Tensor) -> Tensor:
    """A copy, in pinned memory where that speeds up the way back."""
    copy = weight.to("cpu", copy=True)
    return copy.pin_memory() if weight.device.type == "cuda" else copy
