"""The meter against sums by hand, and the measured rate against a plain timing of the same product."""

import json
import time

import pytest
import torch

from oarsmith.models.count import FlopCounter, documents, parameter_sizes, visible_pairs
from oarsmith.models.shifted import ShiftedSparse
from oarsmith.training import speed
from oarsmith.training.speed import SpeedMeter, matmul_rate, matmul_shapes, mfu
from tiny import batches_of, random_samples, tiny_decoder


@pytest.fixture(autouse=True)
def _one_thread(few_threads):
    """Tiny matrices."""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OARSMITH_CACHE", str(tmp_path / "cache"))


def test_mfu():
    assert mfu(3e9, 2.0, 1e10) == pytest.approx(0.15)


def test_a_lap():
    model = tiny_decoder()
    batches = batches_of(random_samples((9, 20, 4)), 2)
    clock = time.perf_counter()
    meter = SpeedMeter(model, rate=1e9)
    for batch in batches:
        meter.add(batch)
    with meter.paused():
        time.sleep(0.2)
    lap, seconds = meter.lap(), time.perf_counter() - clock - 0.2
    counter = FlopCounter(model.spec, parameter_sizes(model.spec))
    head_tokens = sum(int((batch.weights != 0).sum()) for batch in batches)
    flops = counter.of_documents([9, 20, 4], num_head_tokens=head_tokens).total
    # The meter starts a little later than the clock and ends a little earlier; the pause is longer than asked for.
    assert lap["tokens_per_second"] >= 33 / seconds
    assert lap["mfu"] / lap["tokens_per_second"] == pytest.approx(flops / 33 / 1e9)
    assert lap["tokens_per_second"] > 33 / 0.1, "the pause is not counted"
    assert 30 < lap["peak_memory_mb"] < 200_000
    assert meter.lap()["tokens_per_second"] == 0


def test_without_a_rate_there_is_no_mfu():
    assert set(SpeedMeter(tiny_decoder(), rate=None).lap()) == {"tokens_per_second", "peak_memory_mb"}


def test_shifted_attention_sees_fewer_pairs():
    model = tiny_decoder()
    (batch,) = batches_of(random_samples((40,)), 1)
    full = SpeedMeter(model, None)._pairs(batch)(None)
    model.shifted = ShiftedSparse(0.25)
    # Groups of 10; the shifted half has groups of 5, 10, 10, 10 and 5.
    groups = (4 * visible_pairs(documents([10])), visible_pairs(documents([5, 10, 10, 10, 5])))
    assert SpeedMeter(model, None)._pairs(batch)(None) == sum(groups) / 2 < full


def test_adding_a_batch_is_cheap():
    """A pack of 64 documents costs far less than the milliseconds of even a tiny training step."""
    meter = SpeedMeter(tiny_decoder("mistral"), rate=1.0)
    (batch,) = batches_of(random_samples((32,) * 64), 64)
    start = time.perf_counter()
    for _ in range(20):
        meter.add(batch)
    assert (time.perf_counter() - start) / 20 < 0.005


def test_shapes_are_the_models_own():
    shapes = matmul_shapes(tiny_decoder().spec, 100)
    assert shapes == ((100, 32, 96), (100, 32, 64), (100, 48, 32))
    assert all(shape[0] == 2048 for shape in matmul_shapes(tiny_decoder().spec, 10**6))


def test_the_rate_is_that_of_a_plain_product(monkeypatch):
    monkeypatch.setattr(speed, "matmul_shapes", lambda spec, num_tokens: ((256, 256, 256),))
    rate = matmul_rate(tiny_decoder(), 256)
    x, y = torch.randn(256, 256), torch.randn(256, 256)
    best = 0.0
    for _ in range(200):
        start = time.perf_counter()
        x @ y
        best = max(best, 2 * 256**3 / (time.perf_counter() - start))
    # Both are best cases of the same product; a busy machine moves them apart, a wrong formula by far more.
    assert 0.2 < rate / best < 5


def test_the_best_rate_of_a_day_counts(tmp_path, monkeypatch):
    model, speeds, calls = tiny_decoder(), [5.0], []
    monkeypatch.setattr(speed, "_measure", lambda *arguments: calls.append(arguments) or speeds[0])

    def rate(minutes, num_tokens=64):
        return matmul_rate(model, num_tokens, now=lambda: 1000.0 + 60 * minutes)

    assert rate(0) == 5.0
    num_shapes = len(calls)
    assert num_shapes == 3
    speeds[0] = 7.0
    assert rate(9) == 5.0, "measured lately"
    assert len(calls) == num_shapes
    assert rate(11) == 7.0
    speeds[0] = 2.0
    assert rate(60) == 7.0, "the machine is busy now"
    assert len(calls) == 3 * num_shapes
    assert rate(60, 32) == 2.0, "other shapes"
    model.bfloat16()
    assert rate(60) == 2.0, "another number format"
    model.float()
    assert rate(25 * 60) == 2.0, "too long ago"
    kept = json.loads((tmp_path / "cache" / "matmul_rates.json").read_text())
    assert len(kept) == 1, "what has expired is removed"


def test_a_damaged_cache_is_measured_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "_measure", lambda *arguments: 7.0)
    for text in ("no json", "[1]", '{"x": {"rate": "fast"}}'):
        (tmp_path / "cache").mkdir(exist_ok=True)
        (tmp_path / "cache" / "matmul_rates.json").write_text(text)
        assert matmul_rate(tiny_decoder(), 64) == 7.0
