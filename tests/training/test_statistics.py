"""Statistics of a step against NumPy, and its loss and gradient norm against the step itself, bit for bit."""

import math

import numpy as np
import pytest
import torch

from oarsmith.losses.token import token_cross_entropy
from oarsmith.models.recompute import Recompute
from oarsmith.training.optimizer import AdamW, AdamWSettings
from oarsmith.training.statistics import Summary, measure_step
from oarsmith.training.step import run_step
from tiny import batches_of, one_step, random_samples, tiny_decoder

BATCHES = batches_of(random_samples((9, 20, 4)), 2)


@pytest.fixture(autouse=True)
def _one_thread(few_threads):
    """Tiny matrices."""


def test_a_summary_of_several_tensors():
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator) * 3 + 1 for shape in ((4, 5), (7,))]
    summary = Summary()
    for tensor in tensors:
        summary.add(tensor)
    values = np.concatenate([tensor.double().numpy().ravel() for tensor in tensors])
    assert summary.elements == 27
    assert summary.not_finite == 0
    assert summary.mean == pytest.approx(values.mean())
    assert summary.std == pytest.approx(values.std())
    assert summary.norm == pytest.approx(np.linalg.norm(values))
    assert summary.absmax == pytest.approx(np.abs(values).max())


def test_a_summary_leaves_out_what_is_not_finite():
    summary = Summary()
    summary.add(torch.tensor([1.0, math.nan, -3.0, math.inf, -math.inf]))
    summary.add(torch.tensor([math.nan]))
    assert (summary.elements, summary.not_finite) == (6, 4)
    assert (summary.mean, summary.absmax) == (-1.0, 3.0)
    assert summary.norm == pytest.approx(math.sqrt(10))


def test_a_summary_of_large_numbers_does_not_overflow():
    summary = Summary()
    summary.add(torch.full((8,), 1e30))
    assert summary.norm == pytest.approx(1e30 * math.sqrt(8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora_rank", [None, 4])
@pytest.mark.parametrize("size", [2, 3])
def test_the_numbers_are_those_of_the_step(dtype, lora_rank, size):
    """The same sums in the same order, in one micro-batch and in two; a tied embedding has two gradients to add."""
    batches = batches_of(random_samples((9, 20, 4)), size)
    model = tiny_decoder("qwen2", lora_rank=lora_rank)
    for parameter in model.parameters():
        if lora_rank is None or not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    found = measure_step(model, token_cross_entropy, batches)
    optimizer = AdamW(((n, p) for n, p in model.named_parameters() if p.requires_grad), AdamWSettings())
    result = run_step(model, token_cross_entropy, batches, optimizer, lr=0.0, max_grad_norm=0.0)
    assert found.loss == result.total / result.count
    assert found.grad_norm == result.grad_norm
    assert found.finite and found.first_not_finite() is None


def test_gradients_weights_and_parts():
    model = tiny_decoder()
    expected = one_step(model, BATCHES)
    found = measure_step(model, token_cross_entropy, BATCHES)
    assert found.gradients.keys() == expected.grads.keys()
    for name, grad in expected.grads.items():
        assert found.gradients[name].norm == pytest.approx(float(grad.double().norm()), rel=1e-6), name
        assert found.gradients[name].absmax == float(grad.abs().max())
    for name, parameter in model.named_parameters():
        assert found.weights[name].norm == pytest.approx(float(parameter.detach().double().norm()))
    assert list(found.forward) == [
        "embedding",
        "layers.0.attention",
        "layers.0.ffn",
        "layers.0",
        "layers.1.attention",
        "layers.1.ffn",
        "layers.1",
        "final_norm",
    ]
    ids = torch.cat([batch.input_ids for batch in BATCHES])
    assert found.forward["embedding"].mean == pytest.approx(float(model.embedding.weight.detach()[ids].double().mean()))
    assert found.forward["layers.0"].elements == 33 * 32


def test_what_is_computed_again_is_not_counted_twice():
    model = tiny_decoder().train()
    plain = measure_step(model, token_cross_entropy, BATCHES)
    model.recompute = Recompute()
    assert measure_step(model, token_cross_entropy, BATCHES).to_dict() == plain.to_dict()


def test_gradients_of_others_are_left_alone():
    model = tiny_decoder()
    kept = torch.ones_like(model.final_norm.weight)
    model.final_norm.weight.grad = kept.clone()
    measure_step(model, token_cross_entropy, BATCHES)
    assert torch.equal(model.final_norm.weight.grad, kept)
    assert model.embedding.weight.grad is None


def test_where_it_starts():
    broken = tiny_decoder()
    with torch.no_grad():
        broken.layers[1].attention.qkv.weight[3, 5] = math.nan
    found = measure_step(broken, token_cross_entropy, BATCHES)
    assert found.first_not_finite() == "weight layers.1.attention.qkv.weight"
    assert next(name for name, s in found.forward.items() if s.not_finite) == "layers.1.attention"
    assert not found.finite

    overflowing = tiny_decoder()
    with torch.no_grad():
        overflowing.layers[0].ffn.down.weight.mul_(1e30)
        overflowing.layers[0].ffn.gate_up.weight.mul_(1e15)
    found = measure_step(overflowing, token_cross_entropy, BATCHES)
    assert found.first_not_finite() == "output of layers.0.ffn"


def test_a_gradient_that_overflows_is_named():
    model = tiny_decoder()
    model.layers[1].ffn.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * math.inf,))
    found = measure_step(model, token_cross_entropy, BATCHES)
    assert math.isfinite(found.loss)
    assert found.first_not_finite() == "gradient of layers.1.ffn_norm.weight"
