"""Token cross-entropy against its definition."""

import pytest
import torch
from torch.nn import functional

from oarsmith.data.batch import make_batch
from oarsmith.losses.token import TokenCrossEntropy, token_cross_entropy
from tiny import random_samples, tiny_decoder


@pytest.fixture(autouse=True)
def _one_thread(few_threads):
    """Tiny matrices."""


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_definition(family):
    model, batch = tiny_decoder(family), make_batch(random_samples((6, 19, 2)))
    logits = model(batch.input_ids[None], documents=batch.bounds)[0]
    losses = functional.cross_entropy(logits, batch.targets, reduction="none")
    expected = (losses * batch.weights).sum()
    outcome = token_cross_entropy(model, batch, 0.25)
    assert float(outcome.loss.detach()) == pytest.approx(0.25 * float(expected.detach()), rel=1e-6)
    assert outcome.total == pytest.approx(float(expected.detach()), rel=1e-6)
    assert outcome.count == float(batch.weights.sum())
    hits = (logits.argmax(-1) == batch.targets) * batch.weights
    assert outcome.sums["accuracy"] == pytest.approx(float(hits.sum()))
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(outcome.loss, parameters)
    for name, ours, theirs in zip(names, found, torch.autograd.grad(0.25 * expected, parameters), strict=True):
        # Relative to the tensor's size: chunked sums in another order.
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm(), name


def test_a_token_without_weight_is_not_a_target():
    """Changing a target that carries no loss, the last of its document, changes nothing."""
    samples = random_samples((12,))
    model = tiny_decoder()
    samples[0].weights[-1] = 0.0
    before = token_cross_entropy(model, make_batch(samples), 1.0).total
    samples[0].ids[-1] = (samples[0].ids[-1] + 1) % 1120
    assert token_cross_entropy(model, make_batch(samples), 1.0).total == before


def test_weights_scale():
    samples = random_samples((15,))
    model = tiny_decoder()
    single = token_cross_entropy(model, make_batch(samples), 1.0)
    samples[0].weights[:] *= 3
    triple = token_cross_entropy(model, make_batch(samples), 1.0)
    assert triple.total == pytest.approx(3 * single.total)
    assert triple.count == 3 * single.count


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_z_loss(family):
    """The z term is in the gradient and under its own name, not in the reported loss."""
    model, batch = tiny_decoder(family), make_batch(random_samples((6, 19, 2)))
    logits = model(batch.input_ids[None], documents=batch.bounds)[0]
    losses = functional.cross_entropy(logits, batch.targets, reduction="none")
    z_term = 0.1 * (logits.logsumexp(-1).square() * batch.weights).sum()
    outcome = TokenCrossEntropy(z_loss=0.1)(model, batch, 0.25)
    plain = token_cross_entropy(model, batch, 0.25)
    assert outcome.total == plain.total and "z_loss" not in plain.sums
    assert outcome.sums["z_loss"] == pytest.approx(float(z_term.detach()), rel=1e-5)
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(outcome.loss, parameters)
    expected = torch.autograd.grad(0.25 * ((losses * batch.weights).sum() + z_term), parameters)
    for name, ours, theirs in zip(names, found, expected, strict=True):
        # Relative to the tensor's size: chunked sums in another order.
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm(), name
