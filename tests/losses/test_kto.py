"""KTO against TRL, and its KL over the whole step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from made_answers import random_answers, relabelled
from oarsmith.data.answers import make_answer_batch
from oarsmith.losses.answers import score_answers
from oarsmith.losses.kto import KtoLoss
from oarsmith.models.decoder import Decoder
from tiny import tiny_decoder

from .test_preference import close, step

NAN = math.nan
LABELS = [(1.0, NAN), (0.0, NAN), (NAN, 1.0), (1.0, NAN), (NAN, 0.0), (0.0, NAN), (1.0, NAN)]


def rows_with(reference: float) -> Any:
    return relabelled(random_answers(len(LABELS), seed=4, reference=reference), LABELS)


@pytest.fixture(autouse=True)
def _one_thread(few_threads):
    """Tiny matrices."""


@pytest.fixture(scope="module")
def model() -> Decoder:
    return tiny_decoder()


@pytest.mark.parametrize("reference", [-70.0, -20.0], ids=["KL above 0", "KL below 0"])
@pytest.mark.parametrize("kind", ["kto", "apo_zero_unpaired"])
def test_trl(model: Decoder, kind: Any, reference: float) -> None:
    """Values, gradients and metrics."""
    pytest.importorskip("trl")
    from . import trl_parts

    rows = rows_with(reference)
    batch = make_answer_batch(rows)
    own = ~batch.labels_A.isnan()
    scores = score_answers(model, batch).sums_A
    ratios = (scores - batch.references_A)[~own].detach()
    settings = {"beta": 0.05, "desirable_weight": 1.3, "undesirable_weight": 0.6, "loss_type": kind}
    theirs, trainer = trl_parts.kto(scores[own], batch.references_A[own], ratios, batch.labels_A[own], **settings)
    found, grads = step(model, KtoLoss(**settings), [batch])  # type: ignore[arg-type]
    assert found["loss"] == pytest.approx(float(theirs.detach()), rel=1e-6)
    close(grads, list(torch.autograd.grad(theirs, list(model.parameters()))))
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    expected = {"kl": metrics["kl"], "margin": metrics["rewards/margins"]}
    expected |= {
        f"{what}_{side}": metrics[f"{what}/{side}"] for what in ("rewards", "logps") for side in ("chosen", "rejected")
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert (found["kl"] > 0) == (kind == "kto" and reference == -70.0)


def test_the_split_and_the_packing_change_nothing(model: Decoder) -> None:
    """A micro-batch without a good answer, without a bad one, and a row without a mismatched answer."""
    rows = rows_with(-70.0)
    whole, grads = step(model, KtoLoss(), [make_answer_batch(rows)])
    for parts, share in ((((0, 2, 3, 6), (1, 4, 5)), True), (((6, 5, 4, 3, 2, 1, 0),), False)):
        batches = [make_answer_batch([rows[at] for at in part], share=share) for part in parts]
        found, other = step(model, KtoLoss(), batches)
        assert found == pytest.approx(whole, rel=1e-5, abs=1e-6)
        close(other, grads)


def test_mismatched_answers_enter_the_kl_alone(model: Decoder) -> None:
    """At a KL that is not above 0 the step is the one of the own answers by themselves."""
    rows = rows_with(-20.0)
    batch = make_answer_batch(rows)
    found, grads = step(model, KtoLoss(), [batch])
    other, unpaired = step(model, KtoLoss(loss_type="apo_zero_unpaired"), [batch])
    assert found == other
    assert all(torch.equal(a, b) for a, b in zip(grads, unpaired, strict=True))


def test_wrong_rows_are_noticed(model: Decoder) -> None:
    with pytest.raises(AssertionError, match="one answer with a label"):
        KtoLoss()(model, make_answer_batch(random_answers(2)), 1.0)
    with pytest.raises(AssertionError, match="mismatched"):
        KtoLoss()(model, make_answer_batch(random_answers(2, labels=(1.0,))), 1.0)
