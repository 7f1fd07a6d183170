"""Averaged weights: the recurrence, exact masters, swapping in and out, resuming."""

import pytest
import torch

from oarsmith.errors import CheckpointError
from oarsmith.training.ema import Ema
from oarsmith.training.optimizer import AdamW, AdamWSettings
from oarsmith.training.optimizers.offload import Offloaded
from tiny import tiny_decoder


@pytest.fixture(autouse=True)
def _one_thread(few_threads):
    """Tiny matrices."""


def parts(dtype):
    model = tiny_decoder().to(dtype)
    optimizer = AdamW(model.named_parameters(), AdamWSettings())
    return model, optimizer, Ema(optimizer, decay=0.9)


def update(optimizer, step):
    generator = torch.Generator().manual_seed(step)
    grads = {name: torch.randn(p.shape, generator=generator) for name, p in optimizer.parameters.items()}
    optimizer.step(grads, lr=1e-4, grad_scale=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_recurrence_on_masters(dtype):
    """Updates of 1e-4 are below what the 16-bit weights can show."""
    _, optimizer, ema = parts(dtype)
    expected = {name: optimizer.master(name).double().clone() for name in optimizer.parameters}
    for step in range(5):
        update(optimizer, step)
        ema.update()
        for name, average in expected.items():
            expected[name] = 0.9 * average + 0.1 * optimizer.master(name).double()
    for name, average in ema.state_tensors().items():
        assert average.dtype == torch.float32
        torch.testing.assert_close(average.double(), expected[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_applied_swaps_and_restores_bitwise(dtype):
    model, optimizer, ema = parts(dtype)
    for step in range(3):
        update(optimizer, step)
        ema.update()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    averages = {name: tensor.clone() for name, tensor in ema.state_tensors().items()}
    with pytest.raises(ZeroDivisionError), ema.applied():
        for name, parameter in model.named_parameters():
            assert parameter.dtype == dtype and torch.equal(parameter, averages[name].to(dtype))
        assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
        _ = 1 / 0
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    update(optimizer, 4)
    assert all(torch.equal(tensor, averages[name]) for name, tensor in ema.state_tensors().items()), "not aliased"
    assert all(not torch.equal(optimizer.master(name), averages[name]) for name in averages)


def test_resuming():
    _, optimizer, ema = parts(torch.bfloat16)
    update(optimizer, 0)
    ema.update()
    _, _, again = parts(torch.bfloat16)
    again.load_state({name: tensor.clone() for name, tensor in ema.state_tensors().items()})
    assert all(torch.equal(tensor, again.state_tensors()[name]) for name, tensor in ema.state_tensors().items())
    with pytest.raises(CheckpointError, match="averaged weights do not fit"):
        again.load_state({})


def test_of_offloaded_weights():
    model = tiny_decoder().to(torch.bfloat16)
    optimizer = Offloaded(model.named_parameters(), lambda named: AdamW(named, AdamWSettings()))
    ema = Ema(optimizer, decay=0.5)
    start = optimizer.master("head.weight").clone()
    update(optimizer, 0)
    ema.update()
    middle = (start + optimizer.master("head.weight")) / 2
    torch.testing.assert_close(ema.state_tensors()["head.weight"], middle, rtol=1e-6, atol=1e-8)
