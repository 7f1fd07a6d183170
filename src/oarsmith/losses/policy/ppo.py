"""The objective of ``oarsmith ppo``: the policy's loss, and the critic's beside it.

Shapes: T tokens of the batch, N tokens that the model wrote.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from oarsmith.data.batch import Batch
from oarsmith.data.policy_batch import PolicyBatch
from oarsmith.losses.answers import answer_hidden
from oarsmith.losses.policy.objective import PolicyLoss
from oarsmith.losses.policy.scoring import score_hidden
from oarsmith.losses.policy.value import value_loss
from oarsmith.losses.policy.weights import weighted_sums
from oarsmith.losses.token import token_cross_entropy
from oarsmith.models.decoder import Decoder
from oarsmith.training.objective import Outcome


class Values(Protocol):
    """A critic: what is still to come of an answer's reward."""

    def values(self, model: Decoder, hidden_TD: Tensor | None, batch: PolicyBatch) -> Tensor:
        """fp32 [N]: at the state from which each token was drawn. ``hidden_TD``: the policy's states, if they are
        there."""


@dataclass(frozen=True, kw_only=True)
class PpoLoss:
    """PPO (Schulman et al. 2017) with a critic: loss of the policy + value_coef * mean of the critic's.

    Args:
        critic: its parameters get their gradients here, and are updated beside the policy's.
        value_clip: see ``value_loss``.
        ptx_coef: weight of the mean negative log-likelihood of the batches' companions (InstructGPT, Ouyang et al.
            2022, equation 2), where they have some.
    """

    policy: PolicyLoss
    critic: Values
    value_coef: float = 1.0
    value_clip: float | None = 0.2
    ptx_coef: float = 0.0

    def __call__(self, model: Decoder, batch: Batch, scale: float) -> Outcome:
        assert isinstance(batch, PolicyBatch), type(batch)
        hidden_TD, policy = answer_hidden(model, batch), self.policy
        scores = score_hidden(
            model, hidden_TD, batch, temperature=policy.temperature, entropies=policy.entropy_coef != 0
        )
        total, sums = policy.loss(scores, batch)
        values_N = self.critic.values(model, hidden_TD, batch)
        on = values_N.device
        old_N, returns_N, weights_N = (x.to(on) for x in (batch.values_N, batch.returns_N, batch.token_weights_N))
        loss_N, cut_N = value_loss(values_N, old_N, returns_N, self.value_clip)
        value_total = (loss_N * weights_N).sum()
        found = {"value_loss": loss_N, "value_clip_share": cut_N, "value": values_N}
        sums |= weighted_sums(found, weights_N, batch.num_trained)
        whole = total + self.value_coef * value_total.to(total.device)
        if batch.companion is not None:
            texts = token_cross_entropy(model, batch.companion, 1.0 / batch.companion.num_trained)
            # Each pass of a step has texts of its own; what the step minimises has the mean of their means.
            whole = whole + self.ptx_coef * batch.num_trained * texts.loss
            sums["ptx_loss"] = batch.num_trained * texts.total / batch.companion.num_trained
        return Outcome(loss=whole * scale, total=float(whole.detach()), count=batch.num_trained, sums=sums)
