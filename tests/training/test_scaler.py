"""fp16: the loss scale's rules, steps that overflow, and a run that follows the fp32 run."""

import math

import pytest
import torch

from oarsmith.errors import TrainingError
from oarsmith.methods.sft import OBJECTIVE
from oarsmith.training.optimizer import AdamW, AdamWSettings
from oarsmith.training.scaler import LossScaler
from oarsmith.training.step import NonFiniteError, run_step
from tiny import batches_of, random_samples, tiny_decoder

BATCHES = batches_of(random_samples((9, 20, 4)), 2)


@pytest.fixture(autouse=True)
def _one_thread(few_threads):
    """Tiny matrices."""


def test_the_scale_doubles_after_good_steps_and_halves_on_an_overflow():
    scaler = LossScaler(scale=8.0, growth_steps=3)
    seen = []
    for overflowed in (False, False, True, False, False, False, False):
        scaler.update(overflowed=overflowed)
        seen.append(scaler.scale)
    assert seen == [8, 8, 4, 4, 4, 8, 8]


def test_paddles_numbers():
    scaler = LossScaler()
    assert scaler.scale == 32768.0
    for _ in range(1000):
        scaler.update(overflowed=False)
    assert scaler.scale == 65536.0


def test_below_one_it_ends():
    scaler = LossScaler(scale=2.0)
    scaler.update(overflowed=True)
    with pytest.raises(TrainingError, match="overflow at any loss scale"):
        scaler.update(overflowed=True)


def test_state_round_trip():
    scaler = LossScaler(scale=4.0, growth_steps=5, good_steps=3)
    again = LossScaler(growth_steps=5)
    again.load_state(scaler.state())
    assert again == scaler


def trained(dtype, steps, scaler, batches=BATCHES):
    model = tiny_decoder().to(torch.float16).to(dtype)
    optimizer = AdamW(model.named_parameters(), AdamWSettings(weight_decay=0.1))
    results = [
        run_step(model, OBJECTIVE, batches, optimizer, lr=3e-3, max_grad_norm=1.0, scaler=scaler) for _ in range(steps)
    ]
    return model, optimizer, results


@pytest.mark.parametrize("batches", [BATCHES, batches_of(random_samples((9, 20, 4)), 3)], ids=["several", "one"])
def test_fp16_follows_fp32(batches):
    _, optimizer, wide = trained(torch.float32, 10, None, batches)
    _, fp16, narrow = trained(torch.float16, 10, LossScaler(), batches)
    assert not any(result.skipped for result in narrow)
    for ours, exact in zip(narrow, wide, strict=True):
        # fp16 products (2^-11) through two layers; updates of sign-like Adam amplify that in the first steps.
        assert ours.total / ours.count == pytest.approx(exact.total / exact.count, rel=5e-3)
        assert ours.grad_norm == pytest.approx(exact.grad_norm, rel=3e-2)
        assert ours.loss_scale == 32768.0
    assert wide[-1].total < 0.9 * wide[0].total
    moved = [float((fp16.master(name) - optimizer.master(name)).detach().norm()) for name in fp16.parameters]
    start = dict(tiny_decoder().to(torch.float16).float().named_parameters())
    total = [float((optimizer.master(name) - start[name]).detach().norm()) for name in fp16.parameters]
    assert math.hypot(*moved) < 0.2 * math.hypot(*total)


def test_the_scale_cancels():
    """Any power of two gives the same update: fp16 rounding does not depend on the exponent."""
    first, _, _ = trained(torch.float16, 1, LossScaler(scale=2.0**14))
    second, _, _ = trained(torch.float16, 1, LossScaler(scale=2.0**15))
    changed = [bool((p != q).any()) for p, q in zip(first.parameters(), second.parameters(), strict=True)]
    assert sum(changed) <= len(changed) // 4, "but for elements that are subnormal at one of the scales"


def test_an_overflow_is_skipped_and_reported():
    scaler = LossScaler(scale=2.0**40)
    model, optimizer, (result,) = trained(torch.float16, 1, scaler)
    assert result.skipped and not math.isfinite(result.grad_norm) and math.isfinite(result.total)
    assert optimizer.step_count == 0 and scaler.scale == 2.0**39
    before = tiny_decoder().to(torch.float16)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_it_recovers_by_itself():
    scaler = LossScaler(scale=2.0**26)
    _, optimizer, results = trained(torch.float16, 20, scaler)
    skipped = sum(result.skipped for result in results)
    assert 0 < skipped < 15 and not results[-1].skipped
    assert optimizer.step_count == 20 - skipped and results[-1].total < results[0].total


def test_a_loss_that_is_not_finite_is_no_matter_of_scale():
    model = tiny_decoder().to(torch.float16)
    with torch.no_grad():
        model.head.weight[3, 5] = math.inf
    optimizer = AdamW(model.named_parameters(), AdamWSettings())
    with pytest.raises(NonFiniteError, match="the loss is"):
        run_step(model, OBJECTIVE, BATCHES, optimizer, lr=1e-3, max_grad_norm=1.0, scaler=LossScaler())
