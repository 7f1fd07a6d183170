"""Evaluation numbers against transformers on unpacked rows."""

import math

import pytest
import torch
import transformers
from torch.nn import functional

from oarsmith.errors import DataError
from oarsmith.loading import load_model
from oarsmith.methods.sft import OBJECTIVE
from oarsmith.training.evaluate import Evaluation, evaluate, text_perplexity
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
