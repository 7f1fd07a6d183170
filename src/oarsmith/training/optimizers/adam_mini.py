"""Adam-mini: one step size for a block of weights. Shapes: O rows (of all experts), I columns, U units."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from oarsmith.training.optimizers.adamw import AdamWSettings, adamw_state, adamw_update
from oarsmith.training.optimizers.base import Optimizer, decays, master_state, subtract_delta


class AdamMini(Optimizer):
    """Adam-mini (Zhang et al. 2024, algorithm 1 with the partition for transformers): half of AdamW's state.

    The second moment is a mean over a unit: a head of queries or keys, else an output neuron (a token's row in the
    embedding and the head), or the whole of a norm's weight. Biases have AdamW, as in the authors' code.

    Args:
        units: parameter -> runs of rows that form its units, where they are not single rows.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        settings: AdamWSettings,
        units: Mapping[str, tuple[int, ...]],
    ) -> None:
        super().__init__(parameters)
        self.settings = settings
        self._units: dict[str, Tensor | None] = {}
        for name, parameter in self.parameters.items():
            if name.endswith("bias"):
                self._state[name] = adamw_state(parameter)
                continue
            rows = parameter.numel() // parameter.shape[-1] if decays(name, parameter) else 1
            self._units[name] = torch.tensor(units[name], device=parameter.device) if name in units else None
            assert name not in units or sum(units[name]) == rows, f"{name}: {sum(units[name])} of {rows} rows"
            self._state[name] = {
                "exp_avg": torch.zeros_like(parameter, dtype=torch.float32),
                "unit_sq": torch.zeros(len(units[name]) if name in units else rows, device=parameter.device),
            } | master_state(parameter)

    @torch.no_grad()
    def update(self, name: str, grad: Tensor, *, lr: float, grad_scale: float, step: int) -> None:
        parameter, state = self.parameters[name].data, self._state[name]
        rule = self.settings.rule(name, parameter, lr=lr, grad_scale=grad_scale, step=step)
        if name not in self._units:
            adamw_update(parameter, state, grad, rule)
            return
        units, exp_avg, unit_sq = self._units[name], state["exp_avg"], state["unit_sq"]
        grad = grad.float() * grad_scale
        rows_O = grad.square().reshape(-1, grad.shape[-1] if decays(name, parameter) else grad.numel()).mean(-1)
        mean_U = rows_O if units is None else torch.segment_reduce(rows_O, "mean", lengths=units)
        exp_avg.lerp_(grad, 1 - rule.beta1)
        unit_sq.lerp_(mean_U, 1 - rule.beta2)
        correction1, correction2 = rule.corrections
        size_U = (lr / correction1) / ((unit_sq / correction2).sqrt() + rule.eps)
        size_O = size_U if units is None else size_U.repeat_interleave(units)
        delta = (exp_avg.view(len(size_O), -1) * size_O[:, None]).view(parameter.shape)
        subtract_delta(parameter, state, delta, keep=1 - lr * rule.weight_decay)
