"""AdamW over named parameters, with exact fp32 masters for bf16 weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from oarsmith.errors import CheckpointError
from oarsmith.kernels import AdamWRule, adamw_step


@dataclass(frozen=True, kw_only=True)
class AdamWSettings:
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0


class AdamW:
    """Decoupled weight decay Adam (Loshchilov and Hutter 2019). Decay spares biases and norms.

    State per parameter: two fp32 moments, and for a bf16 parameter an int16 remainder that completes it to its fp32
    master. Tensors are created at once, so that memory does not grow at the first step.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], settings: AdamWSettings) -> None:
        self.settings = settings
        self.step_count = 0
        self._parameters = dict(parameters)
        self._state: dict[str, dict[str, Tensor]] = {}
        for name, parameter in self._parameters.items():
            state = {
                "exp_avg": torch.zeros_like(parameter, dtype=torch.float32),
                "exp_avg_sq": torch.zeros_like(parameter, dtype=torch.float32),
            }
            if parameter.dtype == torch.bfloat16:
                state["low"] = torch.zeros_like(parameter, dtype=torch.int16)
            self._state[name] = state

    @torch.no_grad()
    def step(self, grads: Mapping[str, Tensor], *, lr: float, grad_scale: float) -> None:
        """One update; ``grad_scale`` multiplies every gradient (clipping)."""
        self.step_count += 1
        for name, parameter in self._parameters.items():
            rule = AdamWRule(
                lr=lr,
                beta1=self.settings.beta1,
                beta2=self.settings.beta2,
                eps=self.settings.eps,
                weight_decay=self.settings.weight_decay if _decays(name, parameter) else 0.0,
                step=self.step_count,
                grad_scale=grad_scale,
            )
            state = self._state[name]
            moments = state["exp_avg"], state["exp_avg_sq"]
            adamw_step(parameter.data, state.get("low"), grads[name], *moments, rule)

    def state_tensors(self) -> dict[str, Tensor]:
        """``{parameter}/{what}`` -> tensor, for a checkpoint."""
        return {f"{name}/{what}": t for name, state in self._state.items() for what, t in state.items()}

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor], step_count: int) -> None:
        """Restore what :meth:`state_tensors` gave.

        Raises:
            CheckpointError: the state belongs to other parameters.
        """
        own = self.state_tensors()
        if set(own) != set(tensors):
            odd = sorted(set(own) ^ set(tensors))[0]
            raise CheckpointError(
                f"the optimizer state does not fit this model: {odd}", fix="resume with the settings of the first run"
            )
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
        self.step_count = step_count


def _decays(name: str, parameter: Tensor) -> bool:
    """Matrices do. The biases of stacked experts and norms with weights for each head are no matrices."""
    *_, owner, leaf = ["", *name.split(".")]
    return parameter.dim() > 1 and leaf != "bias" and not owner.endswith("norm")
