"""Loss, perplexity and token accuracy on held-out batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from oarsmith.data.batch import Batch
from oarsmith.errors import DataError
from oarsmith.models.decoder import Decoder
from oarsmith.models.layout import Layout
from oarsmith.training.objective import Objective


@dataclass(frozen=True)
class Evaluation:
    """Means over all trained tokens of the set."""

    loss: float
    accuracy: float
    count: float

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    def record(self) -> dict[str, float]:
        return {"eval_loss": self.loss, "eval_perplexity": self.perplexity, "eval_accuracy": self.accuracy}


@torch.no_grad()
def evaluate(
    model: Decoder, objective: Objective, batches: Iterable[Batch], progress: Callable[[int], None] | None = None
) -> Evaluation:
    """Run the objective without gradients; the model's mode is restored."""
    training = model.training
    model.eval()
    total = count = correct = 0.0
    for index, batch in enumerate(batches):
        outcome = objective(model, batch, 1.0)
        total, count = total + outcome.total, count + outcome.count
        correct += outcome.sums.get("accuracy", 0.0)
        if progress is not None:
            progress(index + 1)
    model.train(training)
    assert count > 0, "nothing to evaluate on"
    return Evaluation(total / count, correct / count, count)


@torch.no_grad()
def text_perplexity(model: Decoder, ids: list[int], window: int = 1024) -> float:
    """exp(mean -log p) of a text cut into windows of ``window`` tokens, each scored from its second token on."""
    targets, scores = 0, 0.0
    for start in range(0, len(ids), window):
        piece = torch.tensor(ids[start : start + window], device=model.device)
        if len(piece) < 2:
            continue
        layout = Layout.documents((0, len(piece)), torch.arange(len(piece), device=piece.device))
        hidden_TD = model.hidden(piece, layout)[:-1]
        ones = torch.ones(len(piece) - 1, device=piece.device)
        scores += float(model.head_loss(hidden_TD, piece[1:], ones).loss)
        targets += len(piece) - 1
    if targets == 0:
        raise DataError("the text is shorter than two tokens", fix="give a longer text")
    return math.exp(scores / targets)
