"""What all optimizers share: named parameters, their state, exact fp32 masters, checkpoints."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from oarsmith.errors import CheckpointError
from oarsmith.kernels.masters import join_master, subtract

State = dict[str, Tensor]


class Optimizer(ABC):
    """Updates named parameters from their gradients.

    The state of a parameter holds what completes it to its fp32 master (:func:`master_state`) and what the rule
    remembers. All of it is created at once, so that memory does not grow at the first step, and is all a resume needs:
    randomness is keyed by the step.

    Attributes:
        parameters: by name.
        step_count: updates made; the first one is number 1.
        rate_factors: what the learning rate of a parameter is multiplied with, where not with 1.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        self.parameters = dict(parameters)
        self.step_count = 0
        self.rate_factors: Mapping[str, float] = {}
        self._state: dict[str, State] = {}

    @abstractmethod
    def update(self, name: str, grad: Tensor, *, lr: float, grad_scale: float, step: int) -> None:
        """Update number ``step`` of one parameter; ``grad_scale`` multiplies its gradient (clipping, loss scale)."""

    def step(self, grads: Mapping[str, Tensor], *, lr: float, grad_scale: float) -> None:
        """One update of every parameter."""
        self.step_count += 1
        for name in self.parameters:
            self.update(name, grads[name], lr=self.rate(name, lr), grad_scale=grad_scale, step=self.step_count)

    def rate(self, name: str, lr: float) -> float:
        """A parameter's learning rate where the run's is ``lr``."""
        return lr * self.rate_factors.get(name, 1.0)

    def master(self, name: str) -> Tensor:
        """The fp32 value behind a parameter; not to be written to."""
        return master_of(self.parameters[name].data, self._state[name])

    def adopt_weights(self) -> None:
        """Take the parameters as they are for new masters: to be called when somebody else has changed them."""
        for name, parameter in self.parameters.items():
            adopt_weight(parameter.data, self._state[name])

    def state_tensors(self) -> dict[str, Tensor]:
        """``{parameter}/{what}`` -> tensor, for a checkpoint."""
        return {f"{name}/{what}": t for name, state in self._state.items() for what, t in state.items()}

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor], step_count: int) -> None:
        """Restore what :meth:`state_tensors` gave; the weights have been restored already.

        Raises:
            CheckpointError: the state belongs to other parameters or another rule.
        """
        own = self.state_tensors()
        found = {name: (t.shape, t.dtype) for name, t in tensors.items()}
        odd = sorted(name for name in own.keys() | found if name not in own or found.get(name) != _kind(own[name]))
        if odd:
            raise CheckpointError(
                f"the optimizer state does not fit this model and optimizer: {odd[0]}",
                fix="resume with the settings of the first run",
            )
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
        self.step_count = step_count


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype


def master_state(parameter: Tensor) -> State:
    """What completes a parameter to its fp32 master.

    fp32: nothing. bf16: ``low``, the lower 16 bits (see ``kernels/masters.py``). fp16 has another exponent than fp32,
    so there the master is a tensor of its own.
    """
    if parameter.dtype == torch.bfloat16:
        return {"low": torch.zeros_like(parameter, dtype=torch.int16)}
    if parameter.dtype == torch.float16:
        return {"master": parameter.detach().float()}
    assert parameter.dtype == torch.float32, f"{parameter.dtype} weights cannot be trained"
    return {}


def master_of(parameter: Tensor, state: State) -> Tensor:
    """The fp32 master: the parameter's or the state's own memory where that is fp32, else computed."""
    if "low" in state:
        return join_master(parameter, state["low"])
    return state.get("master", parameter)


def subtract_delta(parameter: Tensor, state: State, delta: Tensor, *, keep: float) -> None:
    """master = keep * master - delta, and the parameter with it."""
    if "master" in state:
        subtract(state["master"], None, delta, keep)
        parameter.copy_(state["master"])
    else:
        subtract(parameter, state.get("low"), delta, keep)


def adopt_weight(parameter: Tensor, state: State) -> None:
    """Make the parameter its own master."""
    if "low" in state:
        state["low"].zero_()
    elif "master" in state:
        state["master"].copy_(parameter)


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay is for this parameter: matrices.

    The biases of stacked experts, DoRA's lengths of theirs and norms with weights for each head are no matrices.
    """
    *_, owner, leaf = ["", *name.split(".")]
    return parameter.dim() > 1 and leaf not in ("bias", "lora_magnitude_vector") and not owner.endswith("norm")
