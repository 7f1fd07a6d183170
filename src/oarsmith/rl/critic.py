"""Critics: a model of its own with a head of one score, or a head on the policy's own states; and their updates.

Shapes: T tokens of the batch, N tokens that the model wrote, D hidden.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from oarsmith.data.policy_batch import Floats, Learned, PolicyBatch, make_policy_batch
from oarsmith.losses.answers import answer_hidden
from oarsmith.models.decoder import Decoder
from oarsmith.rl.referee import in_passes
from oarsmith.training.optimizer import Optimizer
from oarsmith.training.schedule import Schedule
from oarsmith.training.step import global_norm
from oarsmith.training.update_hooks import UpdateHooks


class Critic(ABC):
    """See above.

    Attributes:
        module: what has its parameters.
    """

    module: nn.Module

    @abstractmethod
    def values(self, model: Decoder, hidden_TD: Tensor | None, batch: PolicyBatch) -> Tensor:
        """fp32 [N]; see ``losses.policy.ppo.Values``."""

    @torch.no_grad()
    def judge(self, model: Decoder, answers: Sequence[Learned], *, capacity: int, share: bool) -> list[Floats]:
        """Of each answer, the values at its tokens, as they are now."""
        training, found = model.training, list[Floats]()
        model.eval()
        for chosen in in_passes(answers, capacity):
            batch = make_policy_batch(chosen, count=1.0, facts={}, share=share)
            values_N = self.values(model, None, batch).float().cpu()
            found += [np.asarray(part) for part in values_N.split(list(batch.sizes))]
        model.train(training)
        return found


class SeparateCritic(Critic):
    """A decoder whose head gives one score, such as a reward model (PaddleNLP, InstructGPT)."""

    def __init__(self, decoder: Decoder) -> None:
        assert decoder.spec.head.num_scores == 1, decoder.spec.head
        self.module = self.decoder = decoder

    def values(self, model: Decoder, hidden_TD: Tensor | None, batch: PolicyBatch) -> Tensor:
        states_TD = answer_hidden(self.decoder, batch)
        return self.decoder.scores(states_TD[batch.predictors_N.to(self.decoder.device)])[:, 0]


class SharedCritic(Critic):
    """One linear map on the policy's last states; its loss trains the policy's trunk too."""

    def __init__(self, model: Decoder) -> None:
        self.module = nn.Linear(model.spec.hidden_size, 1, device=model.device)
        nn.init.zeros_(self.module.weight)
        nn.init.zeros_(self.module.bias)

    def values(self, model: Decoder, hidden_TD: Tensor | None, batch: PolicyBatch) -> Tensor:
        states_TD = answer_hidden(model, batch) if hidden_TD is None else hidden_TD
        found: Tensor = self.module(model.final(states_TD[batch.predictors_N.to(model.device)]).float())
        return found[:, 0]


@dataclass(kw_only=True)
class CriticUpdates(UpdateHooks):
    """The critic's optimizer, stepped after the policy's. Gradients come from the same backward pass.

    Args:
        max_grad_norm: of the critic's own gradient; 0: it is not clipped.
    """

    critic: Critic
    optimizer: Optimizer
    schedule: Schedule
    max_grad_norm: float

    def updated(self, grads: Mapping[str, Tensor], *, grad_scale: float, step: int) -> bool:
        """The policy's parameters stay as they are."""
        own = {name: self._taken(parameter) for name, parameter in self.optimizer.parameters.items()}
        norm = global_norm(own.values())
        clip = min(1.0, self.max_grad_norm / (norm + 1e-6)) if self.max_grad_norm > 0 else 1.0
        self.optimizer.step(own, lr=self.schedule(step - 1), grad_scale=clip)
        return False

    @staticmethod
    def _taken(parameter: Tensor) -> Tensor:
        grad, parameter.grad = parameter.grad, None
        return torch.zeros_like(parameter) if grad is None else grad

    def state_tensors(self) -> dict[str, Tensor]:
        weights = {f"weight/{name}": parameter.detach() for name, parameter in self.optimizer.parameters.items()}
        states = {f"state/{name}": tensor for name, tensor in self.optimizer.state_tensors().items()}
        return {**weights, **states, "steps": torch.tensor([self.optimizer.step_count])}

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in self.optimizer.parameters.items():
            parameter.copy_(tensors[f"weight/{name}"])
        states = {name.removeprefix("state/"): t for name, t in tensors.items() if name.startswith("state/")}
        self.optimizer.load_state(states, int(tensors["steps"]))
