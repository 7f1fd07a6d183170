"""AdamW with both moments in 8 bits."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn

from oarsmith.kernels import Moments8bit, adam8bit_step
from oarsmith.kernels.adam8bit import new_moments
from oarsmith.training.optimizers.adamw import AdamWSettings, adamw_state, adamw_update
from oarsmith.training.optimizers.base import Optimizer, State, master_state

# Elements from which a tensor's moments are kept in 8 bits; below, there is nothing to gain (as in bitsandbytes).
MIN_SIZE = 4096


class Adam8bit(Optimizer):
    """AdamW with block-wise 8-bit moments (Dettmers et al. 2022): 2.03 bytes a parameter in place of 8.

    Args:
        wide: parameters whose moments stay fp32. Embeddings belong here (section 2.3 of the paper): their rows seldom
            have a gradient, and where a second moment has rounded to zero, the first is divided by ``eps`` alone.
    """

    def __init__(
        self, parameters: Iterable[tuple[str, nn.Parameter]], settings: AdamWSettings, *, wide: Collection[str] = ()
    ) -> None:
        super().__init__(parameters)
        self.settings = settings
        for name, parameter in self.parameters.items():
            small = parameter.numel() < MIN_SIZE
            self._state[name] = adamw_state(parameter) if small or name in wide else _state_8bit(parameter)

    @torch.no_grad()
    def update(self, name: str, grad: Tensor, *, lr: float, grad_scale: float, step: int) -> None:
        parameter, state = self.parameters[name].data, self._state[name]
        rule = self.settings.rule(name, parameter, lr=lr, grad_scale=grad_scale, step=step)
        if "exp_avg_scale" not in state:
            adamw_update(parameter, state, grad, rule)
            return
        moments = Moments8bit(*(state[what] for what in Moments8bit._fields))
        if "master" in state:
            adam8bit_step(state["master"], None, grad, moments, rule)
            parameter.copy_(state["master"])
        else:
            adam8bit_step(parameter, state.get("low"), grad, moments, rule)


def _state_8bit(parameter: Tensor) -> State:
    return new_moments(parameter)._asdict() | master_state(parameter)
