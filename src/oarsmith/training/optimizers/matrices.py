"""Rules that see a matrix as a whole, applied to each matrix of each parameter on its own.

Shapes: E matrices side by side (experts), O rows, I columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from oarsmith.training.optimizers.adamw import AdamWSettings, adamw_state, adamw_update
from oarsmith.training.optimizers.base import Optimizer, State, decays, master_state, subtract_delta
from oarsmith.training.optimizers.blocks import RowBlocks


class MatrixRule(Protocol):
    """The rule for one matrix, or several of one shape side by side."""

    def fresh(self, matrix: Tensor) -> State:
        """State at the start, for a matrix [..., O, I] of this shape."""

    def delta(self, key: str, grad: Tensor, state: State, lr: float, step: int) -> Tensor:
        """What is subtracted from the matrix, given its fp32 gradient. Updates ``state``; ``key`` names the matrix."""


class MatrixOptimizer(Optimizer):
    """A :class:`MatrixRule` for the parameters in ``blocks``, AdamW for the others.

    Weight decay is decoupled, at the learning rate, and comes first (as in PyTorch's AdamW and Muon). Several matrices
    in one parameter have a state each, ``{what}.{index}``.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        rule: MatrixRule,
        blocks: Mapping[str, RowBlocks],
        others: AdamWSettings,
    ) -> None:
        super().__init__(parameters)
        self.rule = rule
        self.blocks = {name: blocks[name] for name in self.parameters if name in blocks}
        self.others = others
        for name, parameter in self.parameters.items():
            self._state[name] = self._fresh(name, parameter) if name in self.blocks else adamw_state(parameter)

    def _fresh(self, name: str, parameter: Tensor) -> State:
        state: State = {}
        for index, part in enumerate(self.blocks[name].split(parameter.detach())):
            state |= {f"{what}.{index}": tensor for what, tensor in self.rule.fresh(part).items()}
        return state | master_state(parameter)

    @torch.no_grad()
    def update(self, name: str, grad: Tensor, *, lr: float, grad_scale: float, step: int) -> None:
        parameter, state = self.parameters[name].data, self._state[name]
        if name not in self.blocks:
            rule = self.others.rule(name, parameter, lr=lr, grad_scale=grad_scale, step=step)
            adamw_update(parameter, state, grad, rule)
            return
        blocks, deltas = self.blocks[name], []
        for index, part in enumerate(blocks.split(grad)):
            own = {what.removesuffix(f".{index}"): t for what, t in state.items() if what.endswith(f".{index}")}
            deltas.append(self.rule.delta(f"{name}/{index}", part.float() * grad_scale, own, lr, step))
        keep = 1 - lr * self.others.weight_decay if decays(name, parameter) else 1.0
        subtract_delta(parameter, state, blocks.join(deltas), keep=keep)
