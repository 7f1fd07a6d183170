"""Next-token cross-entropy on the tokens that carry loss.

Shapes: T tokens of the stream, N tokens with weight, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from oarsmith.data.batch import Batch
from oarsmith.models.decoder import Decoder
from oarsmith.models.layout import Layout
from oarsmith.training.objective import Outcome


@dataclass(frozen=True, kw_only=True)
class TokenCrossEntropy:
    """sum_t weight_t * -log p(target_t), with head and softmax only where weight is not zero.

    Args:
        z_loss: weight of the z term weight_t * log(Z_t)^2, Z the softmax's denominator (PaLM, Chowdhery et al. 2022,
            section 5). It is part of what is minimised; the reported total stays the plain cross-entropy, and ``sums``
            has the term under ``z_loss``.
    """

    z_loss: float = 0.0

    def __call__(self, model: Decoder, batch: Batch, scale: float) -> Outcome:
        """One micro-batch.

        Args:
            scale: 1 / (sum of weights over the whole step, all micro-batches): makes the step's loss a mean over
                tokens, so any split into micro-batches gives the same loss and gradient.
        """
        device = model.device
        layout = Layout.documents(batch.bounds, batch.positions.to(device)).asking(batch.prompts)
        hidden_TD = model.hidden(batch.input_ids.to(device), layout)
        chosen_N = batch.weights.nonzero()[:, 0].to(device)
        weights_N, targets_N = batch.weights.to(device)[chosen_N], batch.targets.to(device)[chosen_N]
        result = model.head_loss(hidden_TD[chosen_N], targets_N, weights_N * scale, z_loss=self.z_loss)
        total = float(-(weights_N.double() * result.logprobs_N.double()).sum())
        sums = {"accuracy": float((weights_N.double() * result.correct_N).sum())}
        if self.z_loss > 0:
            sums["z_loss"] = self.z_loss * float((weights_N.double() * result.lse_N.double().square()).sum())
        return Outcome(loss=result.loss, total=total, count=batch.num_trained, sums=sums)


token_cross_entropy = TokenCrossEntropy()
