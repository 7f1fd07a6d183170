"""What counts as a spike, and that a resumed run judges the same."""

import json

import numpy as np
import pytest

from oarsmith.training.spikes import SpikeDetector


def fed(losses, factor=3.0, window=64):
    detector = SpikeDetector(factor, window)
    return detector, [step for step, loss in enumerate(losses, start=1) if detector.check(loss) is not None]


def noisy(count, level=2.0, spread=0.2, seed=0):
    return (level + spread * np.random.default_rng(seed).standard_normal(count)).tolist()


def test_a_jump_is_a_spike_and_noise_is_not():
    losses = noisy(200)
    losses[120] = 7.0
    assert fed(losses)[1] == [121]


def test_what_it_says():
    detector, _ = fed([2.0] * 30)
    assert detector.check(8.0) == "the loss is 8, 4 times the median 2 of the 30 steps before"


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_what_is_not_a_number_is_a_spike(loss):
    detector, _ = fed([2.0] * 30)
    assert detector.check(loss) is not None


def test_the_fast_fall_at_the_start_is_none():
    assert fed([11.0 * 0.9**step + 2.0 for step in range(100)])[1] == []


def test_nothing_is_judged_before_the_warmup():
    assert fed([1.0] * 19 + [50.0])[1] == []
    assert fed([1.0] * 20 + [50.0])[1] == [21]


def test_losses_that_scatter_by_nature_are_no_spikes():
    """Rows that are nearly known, and some that are not: three times the median is an everyday value here."""
    losses = np.random.default_rng(1).lognormal(mean=-3.0, sigma=1.0, size=300)
    simple = sum(losses[n] > 3 * np.median(losses[max(0, n - 64) : n]) for n in range(20, 300))
    assert len(fed(losses.tolist())[1]) < simple / 2


def test_a_new_level_is_reported_only_until_it_is_the_median():
    found = fed(noisy(64) + noisy(100, level=10.0))[1]
    assert found[0] == 65
    assert found[-1] <= 64 + 33, "half a window of the new level makes it the median"


def test_factor_zero_finds_nothing():
    assert fed([2.0] * 50 + [1e9], factor=0.0)[1] == []


def test_a_resumed_detector_judges_the_same():
    losses = noisy(150, seed=3)
    losses[100], losses[140] = 9.0, 8.0
    whole = fed(losses)[1]
    first, _ = fed(losses[:90])
    second = SpikeDetector(3.0)
    second.load_state(json.loads(json.dumps(first.state())))
    assert [step for step, loss in enumerate(losses[90:], start=91) if second.check(loss) is not None] == whole
