"""The learning rate, update by update, against transformers."""

import pytest
import torch
import transformers

from oarsmith.errors import ConfigError
from oarsmith.training.schedule import Schedule

MAKERS = {
    "linear": lambda o, warmup, total: transformers.get_linear_schedule_with_warmup(o, warmup, total),
    "cosine": lambda o, warmup, total: transformers.get_cosine_schedule_with_warmup(o, warmup, total),
    "constant": lambda o, warmup, total: transformers.get_constant_schedule(o),
    "constant_with_warmup": lambda o, warmup, total: transformers.get_constant_schedule_with_warmup(o, warmup),
}


@pytest.mark.parametrize(
    ("kind", "warmup"),
    [("constant", 0), *((kind, warmup) for kind in MAKERS if kind != "constant" for warmup in (0, 1, 5))],
)
def test_as_transformers(kind, warmup):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
    theirs = MAKERS[kind](optimizer, warmup, 20)
    ours = Schedule(kind=kind, peak=3e-4, total_steps=20, warmup_steps=warmup)
    for index in range(20):
        assert ours(index) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12, abs=1e-18), index
        optimizer.step()
        theirs.step()


def test_constant_with_warmup_steps_warms_up():
    assert [Schedule(kind="constant", peak=1.0, total_steps=9, warmup_steps=4)(i) for i in range(6)] == [
        0.0,
        0.25,
        0.5,
        0.75,
        1.0,
        1.0,
    ]


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_the_floor_is_reached_and_kept(kind):
    schedule = Schedule(kind=kind, peak=1.0, total_steps=10, warmup_steps=2, floor=0.1)
    rates = [schedule(index) for index in range(2, 13)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == 1.0
    assert rates[-3:] == pytest.approx([0.1] * 3)


def test_a_warmup_as_long_as_the_run():
    schedule = Schedule(kind="cosine", peak=1.0, total_steps=3, warmup_steps=3)
    assert [schedule(index) for index in range(3)] == pytest.approx([0, 1 / 3, 2 / 3])


def rates(schedule, count):
    return [schedule(index) for index in range(count)]


def theirs(make, count, peak=3e-4):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    schedule = make(optimizer)
    found = []
    for _ in range(count):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("power", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("floor", [1e-7, 1e-4])
def test_polynomial_as_transformers(power, floor):
    ours = Schedule(kind="polynomial", peak=3e-4, total_steps=20, warmup_steps=4, power=power, floor=floor)
    expected = theirs(
        lambda o: transformers.get_polynomial_decay_schedule_with_warmup(o, 4, 20, lr_end=floor, power=power), 24
    )
    assert rates(ours, 24) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("cycles", [0.25, 0.5, 1.5])
def test_cosine_cycles_as_transformers(cycles):
    ours = Schedule(kind="cosine", peak=3e-4, total_steps=20, warmup_steps=4, num_cycles=cycles)
    expected = theirs(lambda o: transformers.get_cosine_schedule_with_warmup(o, 4, 20, num_cycles=cycles), 20)
    assert rates(ours, 20) == pytest.approx(expected, rel=1e-12, abs=1e-18)


WSD_STYLES = {"linear": "linear", "cosine": "cosine", "minus_sqrt": "1-sqrt"}  # ours: transformers'


@pytest.mark.parametrize("style", WSD_STYLES)
@pytest.mark.parametrize("floor", [0.0, 3e-5])
def test_wsd_as_transformers(style, floor):
    ours = Schedule(
        kind="wsd", peak=3e-4, total_steps=30, warmup_steps=5, floor=floor, wsd_decay_steps=10, wsd_style=style
    )
    expected = theirs(
        lambda o: transformers.get_wsd_schedule(
            o, 5, 10, num_training_steps=30, decay_type=WSD_STYLES[style], min_lr_ratio=floor / 3e-4
        ),
        33,
    )
    # transformers scales warmup to the floor too: from min_lr_ratio, not from 0.
    assert rates(ours, 33)[5:] == pytest.approx(expected[5:], rel=1e-9, abs=1e-18)
    assert rates(ours, 6)[:5] == pytest.approx([3e-4 * index / 5 for index in range(5)])


def test_wsd_exponential_as_megatron():
    """Megatron-core's OptimizerParamScheduler: 2 * 0.5^(done) - 1."""
    ours = Schedule(
        kind="wsd", peak=1.0, total_steps=10, floor=0.1, wsd_decay_steps=4, wsd_style="exponential", warmup_steps=1
    )
    fall = [0.1 + 0.9 * (2 * 0.5 ** (done / 4) - 1) for done in range(5)]
    assert rates(ours, 12) == pytest.approx([0.0, *[1.0] * 5, *fall, 0.1])


def test_wsd_falls_in_the_last_tenth_by_default():
    ours = Schedule(kind="wsd", peak=1.0, total_steps=40, warmup_steps=2)
    assert rates(ours, 40)[2:37] == [1.0] * 35 and ours(37) < 1.0 and ours(40) == 0.0


@pytest.mark.parametrize("kind", ["linear", "cosine", "polynomial", "wsd"])
def test_decay_steps_end_the_fall_before_the_run(kind):
    """As PaddleNLP: the warmup counts, and the rate stays at the floor afterwards."""
    short = Schedule(kind=kind, peak=1.0, total_steps=12, warmup_steps=2, floor=0.1, wsd_decay_steps=3)
    long = Schedule(kind=kind, peak=1.0, total_steps=50, warmup_steps=2, floor=0.1, wsd_decay_steps=3, decay_steps=12)
    assert rates(long, 12) == rates(short, 12)
    assert rates(long, 50)[12:] == [0.1] * 38


def test_phases_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="floor at step 5, but the warmup takes 5"):
        Schedule(kind="linear", peak=1.0, total_steps=20, warmup_steps=5, decay_steps=5)
    with pytest.raises(ConfigError, match=r"warmup \(12 steps\) and fall \(10 steps\) together are longer than 20"):
        Schedule(kind="wsd", peak=1.0, total_steps=20, warmup_steps=12, wsd_decay_steps=10)
