"""One update: clipping, what a broken step leaves, and the keys of randomness. Sums over splits: tests/invariance."""

import math

import pytest
import torch

from oarsmith.methods.sft import OBJECTIVE
from oarsmith.training.optimizer import AdamW, AdamWSettings
from oarsmith.training.step import NonFiniteError, global_norm, run_step, seed_step
from tiny import batches_of, one_step, random_samples, tiny_decoder

BATCHES = batches_of(random_samples((9, 20, 4)), 2)


@pytest.fixture(autouse=True)
def _one_thread(few_threads):
    """Tiny matrices."""


def update(model, *, max_grad_norm=0.0, lr=0.0, batches=BATCHES):
    optimizer = AdamW(model.named_parameters(), AdamWSettings())
    return run_step(model, OBJECTIVE, batches, optimizer, lr=lr, max_grad_norm=max_grad_norm), optimizer


def test_result():
    model = tiny_decoder()
    result, _ = update(model)
    expected = one_step(model, BATCHES)
    assert result.total / result.count == pytest.approx(expected.loss, rel=1e-6)
    assert result.count == sum(batch.num_trained for batch in BATCHES)
    assert result.num_tokens == 33
    norm = math.sqrt(sum(float(grad.double().norm()) ** 2 for grad in expected.grads.values()))
    assert result.grad_norm == pytest.approx(norm, rel=1e-6)
    assert all(parameter.grad is None for parameter in model.parameters()), "gradients are freed"


@pytest.mark.parametrize("limit", [0.0, 0.5, 1e9])
def test_clipping_scales_what_the_optimizer_sees_and_reports_the_norm_before(limit):
    model = tiny_decoder()
    grads = one_step(model, BATCHES).grads
    norm = global_norm(grads.values())
    result, optimizer = update(model, max_grad_norm=limit)
    assert result.grad_norm == pytest.approx(norm)
    factor = 0.5 / norm if limit == 0.5 else 1.0
    first = optimizer.state_tensors()["final_norm.weight/exp_avg"]
    # The first moment after one step is (1 - beta1) times the clipped gradient.
    torch.testing.assert_close(first, 0.1 * factor * grads["final_norm.weight"], rtol=1e-4, atol=1e-9)


def broken_weights():
    model = tiny_decoder()
    with torch.no_grad():
        model.layers[1].attention.qkv.weight[3, 5] = math.nan
    return model


def test_nan_is_noticed_and_nothing_applied():
    model = broken_weights()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = AdamW(model.named_parameters(), AdamWSettings())
    with pytest.raises(NonFiniteError, match="the loss is nan"):
        run_step(model, OBJECTIVE, BATCHES, optimizer, lr=1.0, max_grad_norm=1.0)
    assert optimizer.step_count == 0
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.nan_to_num(7.0), before[name].nan_to_num(7.0))
        assert parameter.grad is None
    assert all(not tensor.any() for tensor in optimizer.state_tensors().values())


def test_a_gradient_that_overflows_is_noticed():
    model = tiny_decoder()
    for parameter in model.parameters():
        parameter.register_hook(lambda grad: grad * 1e38 * 1e38)
    with pytest.raises(NonFiniteError, match="the gradient norm is"):
        update(model, lr=1.0)


def test_unreached_parameters_count_as_zero():
    model = tiny_decoder()
    model.layers[0].requires_grad_(False)
    extra = torch.nn.Parameter(torch.ones(3))
    model.register_parameter("unused", extra)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = AdamW(trained, AdamWSettings())
    run_step(model, OBJECTIVE, BATCHES, optimizer, lr=0.1, max_grad_norm=1.0)
    assert torch.equal(extra, torch.ones(3))


def test_random_numbers_are_keyed():
    def draw(seed, purpose, step):
        seed_step(seed, purpose, step)
        return torch.rand(4).tolist()

    assert draw(1, "step", 5) == draw(1, "step", 5)
    assert len({tuple(draw(*key)) for key in [(1, "step", 5), (2, "step", 5), (1, "other", 5), (1, "step", 6)]}) == 4
    draw(2**40, "step", 1)
