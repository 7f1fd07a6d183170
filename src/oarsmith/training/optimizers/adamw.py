"""AdamW, the rule most runs use and other rules fall back on for what is no matrix."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from oarsmith.kernels import AdamWRule, adamw_step
from oarsmith.training.optimizers.base import Optimizer, State, decays, master_state


@dataclass(frozen=True, kw_only=True)
class AdamWSettings:
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0

    def rule(self, name: str, parameter: Tensor, *, lr: float, grad_scale: float, step: int) -> AdamWRule:
        """The numbers of one update of one parameter."""
        return AdamWRule(
            lr=lr,
            beta1=self.beta1,
            beta2=self.beta2,
            eps=self.eps,
            weight_decay=self.weight_decay if decays(name, parameter) else 0.0,
            step=step,
            grad_scale=grad_scale,
        )


class AdamW(Optimizer):
    """Decoupled weight decay Adam (Loshchilov and Hutter 2019). Decay spares biases and norms.

    State per parameter: two fp32 moments and what its master needs (2 bytes for bf16).
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], settings: AdamWSettings) -> None:
        super().__init__(parameters)
        self.settings = settings
        self._state = {name: adamw_state(parameter) for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def update(self, name: str, grad: Tensor, *, lr: float, grad_scale: float, step: int) -> None:
        parameter = self.parameters[name].data
        rule = self.settings.rule(name, parameter, lr=lr, grad_scale=grad_scale, step=step)
        adamw_update(parameter, self._state[name], grad, rule)


def adamw_state(parameter: Tensor) -> State:
    """Moments of zero, and the master's part."""
    moments = {what: torch.zeros_like(parameter, dtype=torch.float32) for what in ("exp_avg", "exp_avg_sq")}
    return moments | master_state(parameter)


def adamw_update(parameter: Tensor, state: State, grad: Tensor, rule: AdamWRule) -> None:
    """One AdamW step on a parameter whose state :func:`adamw_state` made."""
    moments = state["exp_avg"], state["exp_avg_sq"]
    if "master" in state:
        adamw_step(state["master"], None, grad, *moments, rule)
        parameter.copy_(state["master"])
    else:
        adamw_step(parameter, state.get("low"), grad, *moments, rule)
