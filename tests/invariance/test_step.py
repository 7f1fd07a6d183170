"""Loss and gradients of a step depend on its documents alone: not on how they are split, packed, ordered or computed.

Tolerance: relative L2 difference of every gradient tensor. The same sums in another order differ by some 1e-7 in fp32;
what passes through softmax, norms and two layers adds up to a few 1e-6.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from oarsmith import kernels
from oarsmith.data.batch import make_batch
from oarsmith.models.decoder import Decoder
from oarsmith.models.recompute import Granularity, Recompute
from oarsmith.training.compile import compile_model
from tiny import CONFIGS, Step, batches_of, largest_difference, one_step, random_samples, tiny_decoder

LOSS_TOLERANCE = 1e-6
GRAD_TOLERANCE = 1e-5
# Neighbours of very different length, longer and shorter than the sliding window of 7.
LENGTHS = (5, 40, 2, 17, 64, 3, 9, 31)
SAMPLES = random_samples(LENGTHS)


@pytest.fixture(autouse=True)
def _one_thread(few_threads: None) -> None:
    """Tiny matrices."""


def assert_same(found: Step, expected: Step) -> None:
    assert found.loss == pytest.approx(expected.loss, rel=LOSS_TOLERANCE)
    assert largest_difference(found.grads, expected.grads) < GRAD_TOLERANCE


def one_by_one(model: Decoder) -> Step:
    return one_step(model, batches_of(SAMPLES, 1))


def recomputed(granularity: Granularity) -> Callable[[Decoder], Step]:
    def way(model: Decoder) -> Step:
        model.recompute = Recompute(granularity=granularity)
        return one_step(model, batches_of(SAMPLES, 4))

    return way


def plain_torch(model: Decoder) -> Step:
    with kernels.using("torch"):
        return one_step(model, batches_of(SAMPLES, 4))


WAYS: dict[str, Callable[[Decoder], Step]] = {
    "all in one pack": lambda model: one_step(model, batches_of(SAMPLES, 8)),
    "two packs of four": lambda model: one_step(model, batches_of(SAMPLES, 4)),
    "uneven packs": lambda model: one_step(model, batches_of(SAMPLES, 3)),
    "reversed": lambda model: one_step(model, batches_of(SAMPLES[::-1], 2)),
    "blocks recomputed": recomputed("full"),
    "attention recomputed": recomputed("full_attn"),
    "scores recomputed": recomputed("core_attn"),
    "plain torch": plain_torch,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", CONFIGS)
def test_full(family: str, way: str) -> None:
    assert_same(WAYS[way](tiny_decoder(family)), one_by_one(tiny_decoder(family)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lora(family: str, way: str) -> None:
    expected = one_by_one(tiny_decoder(family, lora_rank=4))
    assert all(".lora_" in name for name in expected.grads)
    assert_same(WAYS[way](tiny_decoder(family, lora_rank=4)), expected)


def test_the_step_is_sensitive() -> None:
    """The comparison above can fail: one changed token moves the gradients far beyond its tolerance."""
    samples = random_samples(LENGTHS)
    samples[3].ids[5] = (samples[3].ids[5] + 1) % 1120
    changed = one_step(tiny_decoder(), batches_of(samples, 1))
    assert largest_difference(changed.grads, one_by_one(tiny_decoder()).grads) > 100 * GRAD_TOLERANCE


@pytest.mark.slow
def test_compiled() -> None:
    """torch.compile, as the job does it."""
    model = tiny_decoder("llama", num_hidden_layers=1)
    expected = one_by_one(model)
    compile_model(model)
    found = one_step(model, batches_of(SAMPLES, 4))
    assert_same(found, expected)


def test_bf16_gradients_of_many_passes_add_up_in_fp32() -> None:
    """16 equal passes give the gradient of one, not one that lost small parts to bf16 sums."""
    model = tiny_decoder().to(torch.bfloat16)
    batch = make_batch(SAMPLES[3:5])
    once, often = one_step(model, [batch]), one_step(model, [batch] * 16)
    # One rounding to bf16 (2^-9) of each part; running bf16 sums are off by several times that.
    assert largest_difference(often.grads, once.grads) < 2**-8
