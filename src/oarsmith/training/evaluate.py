"""Loss, perplexity and token accuracy on held-out batches; log-probabilities of texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch

from oarsmith.data.answers import AnswerBatch
from oarsmith.data.batch import Batch
from oarsmith.errors import DataError
from oarsmith.models.decoder import Decoder
from oarsmith.models.layout import Layout
from oarsmith.training.objective import Objective, StepObjective
from oarsmith.training.ranks import ALONE, Ranks


@dataclass(frozen=True)
class Evaluation:
    """Means over all that is counted in the set: trained tokens, or judged prompts (``of_tokens`` false).

    ``others``: means of what else the objective sums.
    """

    loss: float
    accuracy: float
    count: float
    of_tokens: bool = True
    others: Mapping[str, float] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    def record(self) -> dict[str, float]:
        """As a record of the log."""
        if self.of_tokens:
            return {"eval_loss": self.loss, "eval_perplexity": self.perplexity, "eval_accuracy": self.accuracy}
        others = {f"eval_{name}": value for name, value in self.others.items()}
        return {"eval_loss": self.loss, "eval_accuracy": self.accuracy, **others}


def in_words(record: Mapping[str, float]) -> list[str]:
    """The numbers of an evaluation's record."""
    words = {"eval_loss": "loss {:.4f}", "eval_perplexity": "perplexity {:.2f}", "eval_accuracy": "accuracy {:.1%}"}
    if "eval_perplexity" in record:
        words["eval_accuracy"] = "token accuracy {:.1%}"
    first = [form.format(record[key]) for key, form in words.items() if key in record]
    others = [(key.removeprefix("eval_"), value) for key, value in record.items() if key not in words and key != "step"]
    return first + [f"{key.replace('_', ' ')} {value:.2f}" for key, value in others]


@torch.no_grad()
def evaluate(
    model: Decoder,
    objective: Objective,
    batches: Iterable[Batch],
    progress: Callable[[int], None] | None = None,
    *,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Run the objective without gradients; the model's mode is restored. The whole set is one step.

    ``ranks``: who computes which of the batches.
    """
    training = model.training
    model.eval()
    if isinstance(objective, StepObjective):
        batches = tuple(batches)
        objective = objective.of_step(model, batches)
    total = count = 0.0
    sums, of_tokens = dict[str, float](), True
    for index, one in enumerate(ranks.dealt(batches)):
        outcome = objective(model, one.batch, 1.0)
        counted = 1.0 if one.counts else 0.0
        total, count = total + counted * outcome.total, count + counted * outcome.count
        of_tokens = not isinstance(one.batch, AnswerBatch)
        for name, value in outcome.sums.items():
            sums[name] = sums.get(name, 0.0) + counted * value
        if progress is not None:
            progress(index + 1)
    ranks.end_passes()
    total, count, *others = ranks.total([total, count, *(sums[name] for name in sorted(sums))])
    sums = dict(zip(sorted(sums), others, strict=True))
    model.train(training)
    assert count > 0, "nothing to evaluate on"
    means = {name: value / count for name, value in sums.items()}
    return Evaluation(total / count, means.pop("accuracy", 0.0), count, of_tokens, means)


@dataclass(frozen=True)
class Piece:
    """Token ids, of which those from index ``first`` (at least 1) on are to be scored; the others are context."""

    ids: Sequence[int]
    first: int = 1


@dataclass(frozen=True)
class PieceScore:
    """log p of a piece's scored tokens together, in nats; how many they are; whether each was the likeliest."""

    logprob: float
    num_tokens: int
    greedy: bool


@torch.no_grad()
def score_pieces(model: Decoder, pieces: Sequence[Piece], max_tokens: int = 4096) -> Iterator[PieceScore]:
    """The score of each piece, in order; several go through the model together, up to ``max_tokens`` tokens.

    The last token of a piece is predicted and never read, so a piece may be one token longer than the context.
    """
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        assert 1 <= piece.first < len(piece.ids), (piece.first, len(piece.ids))
        if batch and size + len(piece.ids) - 1 > max_tokens:
            yield from _score_batch(model, batch)
            batch, size = [], 0
        batch.append(piece)
        size += len(piece.ids) - 1
    if batch:
        yield from _score_batch(model, batch)


def _score_batch(model: Decoder, pieces: Sequence[Piece]) -> Iterator[PieceScore]:
    device = model.device
    ids = [index for piece in pieces for index in piece.ids[:-1]]
    bounds = [0, *accumulate(len(piece.ids) - 1 for piece in pieces)]
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(bounds)])
    # Token i of a piece is predicted at place i - 1.
    chosen = [
        at
        for piece, start in zip(pieces, bounds, strict=False)
        for at in range(start + piece.first - 1, start + len(piece.ids) - 1)
    ]
    targets = [index for piece in pieces for index in piece.ids[piece.first :]]
    layout = Layout.documents(bounds, positions.to(device)).asking([piece.first for piece in pieces])
    hidden_TD = model.hidden(torch.tensor(ids, device=device), layout)
    targets_N = torch.tensor(targets, device=device)
    result = model.head_loss(
        hidden_TD[torch.tensor(chosen, device=device)], targets_N, torch.ones(len(targets), device=device)
    )
    counts = [len(piece.ids) - piece.first for piece in pieces]
    found = zip(result.logprobs_N.double().split(counts), result.correct_N.split(counts), counts, strict=True)
    for logprobs, correct, count in found:
        yield PieceScore(float(logprobs.sum()), count, bool(correct.all()))


@dataclass(frozen=True)
class TextScore:
    """A text under a model: ``nats`` are -log p of ``num_tokens`` tokens that spell ``num_bytes`` of UTF-8."""

    nats: float
    num_tokens: int
    num_bytes: int

    @property
    def loss(self) -> float:
        return self.nats / self.num_tokens

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers, as perplexity is not."""
        return self.nats / math.log(2) / max(self.num_bytes, 1)


def windows(ids: Sequence[int], max_length: int, stride: int) -> list[Piece]:
    """A text of any length as pieces of at most ``max_length`` tokens, each ``stride`` tokens after the one before.

    Of each piece only what the one before did not hold is scored, with what it did hold as context: at least
    ``max_length - stride`` tokens. That is transformers' guide to the perplexity of models of fixed length. Without an
    overlap the first token of a piece has no context and is not scored.
    """
    assert 1 <= stride <= max_length, (stride, max_length)
    found, before = [], 0
    for begin in range(0, len(ids), stride):
        end = min(begin + max_length, len(ids))
        first = max(before - begin, 1)
        if first < end - begin:
            found.append(Piece(ids[begin:end], first))
        before = end
        if end == len(ids):
            break
    return found


def text_perplexity(model: Decoder, ids: list[int], window: int = 1024) -> float:
    """exp(mean -log p) of a text cut into windows of ``window`` tokens, each scored from its second token on.

    Raises:
        DataError: the text is shorter than two tokens.
    """
    scores = list(score_pieces(model, windows(ids, window, window)))
    if not scores:
        raise DataError("the text is shorter than two tokens", fix="give a longer text")
    return math.exp(-sum(score.logprob for score in scores) / sum(score.num_tokens for score in scores))
