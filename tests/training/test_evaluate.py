"""Evaluation numbers against transformers on unpacked rows."""

import math

import pytest
import torch
import transformers
from torch.nn import functional

from oarsmith.errors import DataError
from oarsmith.loading import load_model
from oarsmith.methods.sft import OBJECTIVE
from oarsmith.training.evaluate import Evaluation, Piece, TextScore, evaluate, score_pieces, text_perplexity, windows
from tiny import batches_of, random_samples, write_tiny_model


@pytest.fixture(autouse=True)
def _one_thread(few_threads):
    """Tiny matrices."""


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    path = write_tiny_model(tmp_path_factory.mktemp("evaluate") / "model", "qwen2")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return load_model(path), theirs.eval()


def test_loss_perplexity_and_accuracy(both):
    ours, theirs = both
    samples = random_samples((20, 7, 50, 3, 12))
    with torch.no_grad():  # make some predictions right: random ids alone would leave the accuracy at zero
        for sample in samples:
            best = theirs(torch.tensor(sample.ids[None].astype("int64"))).logits[0].argmax(-1)
            sample.ids[-1] = int(best[-2])
    total = count = correct = 0.0
    for sample in samples:
        ids, weights = torch.tensor(sample.ids.astype("int64")), torch.tensor(sample.weights[1:])
        with torch.no_grad():
            logits = theirs(ids[None]).logits[0, :-1]
        total += float((functional.cross_entropy(logits, ids[1:], reduction="none") * weights).sum())
        correct += float(((logits.argmax(-1) == ids[1:]) * weights).sum())
        count += float(weights.sum())
    found = evaluate(ours, OBJECTIVE, batches_of(samples, 2))
    assert found.count == count
    assert found.loss == pytest.approx(total / count, rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)
    assert found.accuracy == pytest.approx(correct / count)
    assert found.accuracy > 0
    assert found.record() == {
        "eval_loss": found.loss,
        "eval_perplexity": found.perplexity,
        "eval_accuracy": found.accuracy,
    }


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored_and_no_gradient_left(both, training):
    model = both[0].train(training)
    calls = []
    evaluate(model, OBJECTIVE, batches_of(random_samples((5, 6)), 1), calls.append)
    assert model.training is training
    assert calls == [1, 2]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_perplexity_of_a_hopeless_model_is_a_number():
    assert Evaluation(loss=5000.0, accuracy=0.0, count=1.0).perplexity < math.inf


@pytest.mark.parametrize("window", [1024, 16])
def test_text_perplexity(both, window):
    ours, theirs = both
    ids = random_samples((50,))[0].ids.tolist()
    losses = []
    for start in range(0, 50, window):
        piece = torch.tensor(ids[start : start + window])
        with torch.no_grad():
            logits = theirs(piece[None]).logits[0, :-1]
        losses.append(functional.cross_entropy(logits, piece[1:], reduction="none"))
    assert text_perplexity(ours, ids, window) == pytest.approx(float(torch.cat(losses).mean().exp()), rel=1e-5)


def test_text_perplexity_needs_two_tokens(both):
    with pytest.raises(DataError, match="shorter than two tokens"):
        text_perplexity(both[0], [1])


def their_logprobs(theirs, ids):
    """log p of ids[1:], each from all before it, and whether it was the likeliest."""
    with torch.no_grad():
        logits = theirs(torch.tensor([list(ids[:-1])])).logits[0]
    targets = torch.tensor(list(ids[1:]))
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0], logits.argmax(-1) == targets


def test_pieces_of_different_lengths_together(both):
    ours, theirs = both
    texts = [sample.ids.tolist() for sample in random_samples((50, 2, 17, 9))]
    with torch.no_grad():  # one piece is what the model finds likeliest
        texts[1] = [texts[1][0], int(theirs(torch.tensor([texts[1][:1]])).logits[0, -1].argmax())]
    pieces = [Piece(texts[0], 20), Piece(texts[1]), Piece(texts[2], 16), Piece(texts[3])]
    for max_tokens in (10_000, 30, 1):
        scores = list(score_pieces(ours, pieces, max_tokens))
        for piece, score in zip(pieces, scores, strict=True):
            logprobs, right = their_logprobs(theirs, piece.ids)
            # fp32 on both sides; sums of up to 30 terms.
            assert score.logprob == pytest.approx(float(logprobs[piece.first - 1 :].sum()), rel=1e-5)
            assert score.num_tokens == len(piece.ids) - piece.first
            assert score.greedy == bool(right[piece.first - 1 :].all())
        assert [score.greedy for score in scores] == [False, True, False, False]


def test_a_piece_may_be_one_token_longer_than_the_context(tmp_path):
    """The last token is predicted, not read: a learned table of positions has no row for it."""
    model = load_model(write_tiny_model(tmp_path / "gpt2", "gpt2", n_positions=16))
    (score,) = score_pieces(model, [Piece(list(range(17)))])
    assert score.num_tokens == 16


@pytest.mark.parametrize(
    ("length", "max_length", "stride"), [(50, 16, 8), (50, 16, 16), (50, 16, 5), (7, 16, 8), (33, 32, 1)]
)
def test_windows_score_every_token_once(length, max_length, stride):
    ids = list(range(length))
    pieces = windows(ids, max_length, stride)
    scored = [index for piece in pieces for index in piece.ids[piece.first :]]
    starts = set(range(0, length, stride)) if stride == max_length else {0}
    assert scored == [index for index in ids if index not in starts]
    assert all(len(piece.ids) <= max_length for piece in pieces)
    assert all(piece.first >= max_length - stride for piece in pieces[1:] if stride < max_length)


def test_windows_of_the_guide(both):
    """The loop of transformers' guide to perplexity, with each token's own log-probability."""
    ours, theirs = both
    ids = random_samples((90,))[0].ids.tolist()
    max_length, stride = 32, 12
    nats, count, previous = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + max_length, len(ids))
        new = end - previous
        logprobs, _ = their_logprobs(theirs, ids[begin:end])
        kept = logprobs[-new:] if begin else logprobs
        nats, count, previous = nats - float(kept.sum()), count + len(kept), end
        if end == len(ids):
            break
    scores = list(score_pieces(ours, windows(ids, max_length, stride)))
    assert sum(score.num_tokens for score in scores) == count == 89
    assert -sum(score.logprob for score in scores) == pytest.approx(nats, rel=1e-5)


def test_bits_per_byte():
    score = TextScore(nats=math.log(2) * 12, num_tokens=4, num_bytes=24)
    assert score.bits_per_byte == pytest.approx(0.5)
    assert score.perplexity == pytest.approx(8)
