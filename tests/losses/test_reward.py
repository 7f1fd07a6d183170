"""Losses of reward models: TRL's, and formulas by hand in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from made_answers import random_answers
from oarsmith.data.answers import make_answer_batch
from oarsmith.losses.reward import (
    ProcessLoss,
    RewardLoss,
    RewardOptions,
    compare,
    first_differences,
    steps_loss,
    token_wise,
)
from oarsmith.models.decoder import Decoder
from tiny import tiny_decoder

from .test_preference import close, step

ROWS = random_answers(5, seed=9)


@pytest.fixture(autouse=True)
def _one_thread(few_threads):
    """Tiny matrices."""


@pytest.fixture(scope="module")
def model() -> Decoder:
    return tiny_decoder()


def head(model: Decoder, hidden_ND: Tensor) -> Tensor:
    """The value head by hand."""
    assert model.final_norm is not None and model.head.weight is not None
    return model.final_norm(hidden_ND) @ model.head.weight[0]


def drawn(count: int = 6) -> list[Tensor]:
    draw = torch.Generator().manual_seed(2)
    return [torch.randn(count, generator=draw, dtype=torch.float64, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("center", [None, 0.05])
def test_trl(center: float | None) -> None:
    pytest.importorskip("trl")
    from . import trl_parts

    chosen, rejected, margins = drawn()
    theirs = trl_parts.reward(chosen, rejected, margins.detach(), center)
    ours = compare(chosen, rejected, margins.detach(), RewardOptions(center=center or 0.0)).mean()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours, [chosen, rejected]), torch.autograd.grad(theirs, [chosen, rejected])
    )


def test_regularisation_and_smoothing() -> None:
    chosen, rejected, margins = (values.detach() for values in drawn())
    z = chosen - rejected - margins
    found = compare(chosen, rejected, margins, RewardOptions(label_smoothing=0.1, square=0.5))
    expected = -0.9 * logsigmoid(z) - 0.1 * logsigmoid(-z) + 0.25 * (chosen**2 + rejected**2)
    torch.testing.assert_close(found, expected)


def test_token_wise_from_the_first_difference() -> None:
    """Answers of 4 and 2 values: the shorter one's last value stays."""
    chosen, rejected = torch.tensor([0.0, 1.0, 3.0, 4.0]).double(), torch.tensor([0.0, 2.0]).double()
    found = token_wise([chosen], [rejected], [1], torch.zeros(1).double(), RewardOptions())
    expected = sum(math.log1p(math.exp(-z)) for z in (1 - 2, 3 - 2, 4 - 2)) / 3
    assert float(found) == pytest.approx(expected)


def test_first_differences() -> None:
    same = np.array([5, 6, 7], dtype=np.int32)
    rows = [replace(ROWS[0], answers=pair) for pair in ((same, same[:2]), (same, same[[0, 2]]), (same[1:], same))]
    prompt = len(ROWS[0].prompt)
    assert first_differences(make_answer_batch(rows)) == [prompt + 1, prompt + 1, prompt]


@pytest.mark.parametrize("kind", ["sequence-wise", "token-wise"])
def test_on_a_decoder(kind: Any) -> None:
    """Values at the tokens of separate sequences; whatever the split and the packing."""
    model = tiny_decoder(architectures=["LlamaForSequenceClassification"], num_labels=1)
    options = RewardOptions(kind=kind, center=0.01, square=0.02)
    loss = RewardLoss(options=options)
    found, grads = step(model, loss, [make_answer_batch(ROWS)])
    along: list[list[Tensor]] = [[], []]
    for row in ROWS:
        for side, answer in enumerate(row.answers):
            batch = make_answer_batch([replace(row, answers=(answer,), labels=(1.0,), reference=())])
            from oarsmith.losses.answers import answer_hidden

            along[side].append(head(model, answer_hidden(model, batch)).double())
    margins = torch.tensor([row.margin for row in ROWS], dtype=torch.float64)
    if kind == "token-wise":
        starts = first_differences(make_answer_batch(ROWS))
        expected = token_wise(along[0], along[1], starts, margins, options).mean()
    else:
        ends = [torch.stack([values[-1] for values in side]) for side in along]
        expected = compare(ends[0], ends[1], margins, options).mean()
    assert found["loss"] == pytest.approx(float(expected), rel=1e-6)
    close(
        grads,
        [
            torch.zeros(()) if g is None else g
            for g in torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)
        ],
    )
    last = [[float(values[-1]) for values in side] for side in along]
    assert found["accuracy"] == pytest.approx(np.mean([a > b for a, b in zip(*last, strict=True)]))
    assert found["margin"] == pytest.approx(np.mean(last[0]) - np.mean(last[1]), rel=1e-5)
    for batches in ([ROWS[:2], ROWS[2:]], [ROWS]):
        again, other = step(model, loss, [make_answer_batch(rows, share=False) for rows in batches])
        assert again == pytest.approx(found, rel=1e-5)
        close(other, grads)


def stepped(count: int = 4) -> Any:
    """Single answers whose steps have hard and soft labels; one has a single step."""
    rows, draw = random_answers(count, seed=11, labels=(math.nan,)), np.random.default_rng(3)
    found = []
    for number, row in enumerate(rows):
        ends = tuple(range(0, len(row.answers[0]), 2)) if number else (len(row.answers[0]) - 1,)
        labels = tuple(draw.choice([0.0, 1.0, 0.3], size=len(ends)).tolist())
        found.append(replace(row, step_ends=ends, step_labels=labels))
    return found


def test_process_rewards(model: Decoder) -> None:
    """The softmax of two tokens at the steps' own last tokens; the mean is over the steps of the whole step."""
    rows, (good, bad) = stepped(), (17, 900)
    losses, hits = [], []
    for row in rows:
        logits = model(torch.tensor([[*row.prompt.tolist(), *row.answers[0].tolist()]]))[0].double()
        for end, label in zip(row.step_ends, row.step_labels, strict=True):
            z = logits[len(row.prompt) + end, good] - logits[len(row.prompt) + end, bad]
            losses.append(-label * logsigmoid(z) - (1 - label) * logsigmoid(-z))
            hits.append((float(z) > 0) == (label > 0.5))
    expected = torch.stack(losses).mean()
    loss = ProcessLoss(reward_tokens=(good, bad))
    found, grads = step(model, loss, [make_answer_batch(rows)])
    assert found["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert found["accuracy"] == pytest.approx(np.mean(hits))
    close(grads, list(torch.autograd.grad(expected, list(model.parameters()))))
    again, other = step(model, loss, [make_answer_batch(rows[:1]), make_answer_batch(rows[1:])])
    assert again == pytest.approx(found, rel=1e-5)
    close(other, grads)


def test_soft_labels() -> None:
    """A label of 0.25 is a quarter of good and three quarters of bad."""
    logits = torch.tensor([[0.3, -1.2]] * 3)
    good, bad, soft = steps_loss(logits, torch.tensor([1.0, 0.0, 0.25], dtype=torch.float64)).tolist()
    assert soft == pytest.approx(0.25 * good + 0.75 * bad)
