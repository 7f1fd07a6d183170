"""The learning rate, update by update, against transformers."""

import pytest
import torch
import transformers

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
