"""Next-token cross-entropy on the tokens that carry loss.

Shapes: T tokens of the stream, N tokens with weight, D hidden, V vocabulary.
"""

from __future__ import annotations

from oarsmith.data.batch import Batch
from oarsmith.models.decoder import Decoder
from oarsmith.models.layout import Layout
from oarsmith.training.objective import Outcome


def token_cross_entropy(model: Decoder, batch: Batch, scale: float) -> Outcome:
    """sum_t weight_t * -log p(target_t), with head and softmax only where weight is not zero.

    Args:
        scale: 1 / (sum of weights over the whole step, all micro-batches): makes the step's loss a mean over tokens, so
            any split into micro-batches gives the same loss and gradient.
    """
    device = model.device
    layout = Layout.documents(batch.bounds, batch.positions.to(device))
    hidden_TD = model.hidden(batch.input_ids.to(device), layout)
    chosen_N = batch.weights.nonzero()[:, 0].to(device)
    weights_N = batch.weights.to(device)[chosen_N]
    result = model.head_loss(hidden_TD[chosen_N], batch.targets.to(device)[chosen_N], weights_N * scale)
    total = float(-(weights_N.double() * result.logprobs_N.double()).sum())
    correct = float((weights_N.double() * result.correct_N).sum())
    return Outcome(loss=result.loss, total=total, count=batch.num_trained, sums={"accuracy": correct})
