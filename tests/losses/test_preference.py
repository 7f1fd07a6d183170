"""The preference objective on decoders: against separate sequences, whatever the split and the packing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from made_answers import random_answers
from oarsmith.data.answers import AnswerBatch, Answered, make_answer_batch, only
from oarsmith.losses.answers import score_answers
from oarsmith.losses.preference.objective import PreferenceLoss
from oarsmith.losses.preference.pairs import Options, Pairs
from oarsmith.losses.preference.table import LOSS_TYPES
from oarsmith.models.decoder import Decoder
from oarsmith.training.evaluate import evaluate
from oarsmith.training.objective import Objective, Outcome, objective_of_step
from oarsmith.training.optimizer import AdamW, AdamWSettings
from oarsmith.training.step import run_step, run_step_in_backward
from tiny import tiny_decoder

ROWS = random_answers(5)


@pytest.fixture(autouse=True)
def _one_thread(few_threads):
    """Tiny matrices."""


@pytest.fixture(scope="module")
def model() -> Decoder:
    return tiny_decoder()


def step(model: Decoder, objective: Objective, batches: Sequence[AnswerBatch]) -> tuple[dict[str, float], list[Tensor]]:
    """Sums and gradients of a step; ``loss`` is its mean, and ``scaled`` what backward began from."""
    of_step = objective_of_step(objective, model, batches)
    scale = 1 / sum(batch.num_trained for batch in batches)
    outcomes: list[Outcome] = []
    grads = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for batch in batches:
        outcomes.append(of_step(model, batch, scale))
        new = torch.autograd.grad(outcomes[-1].loss, list(model.parameters()), allow_unused=True)
        grads = [a if b is None else a + b for a, b in zip(grads, new, strict=True)]
    found = {name: sum(o.sums[name] for o in outcomes) * scale for name in outcomes[0].sums}
    found |= {"loss": sum(o.total for o in outcomes) * scale, "scaled": sum(float(o.loss.detach()) for o in outcomes)}
    return found, grads


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        # fp32 sums in another order; large gradients cancel in small ones.
        assert float((ours - theirs).norm()) <= 2e-5 * float(theirs.norm()) + 1e-6


def separate(model: Decoder, row: Answered) -> tuple[list[Tensor], list[Tensor]]:
    """Of each answer the tokens' log-probabilities and log sums of squared ones, each answer a sequence of its own."""
    logprobs, squares = [], []
    for answer in row.answers:
        ids = torch.tensor([*row.prompt.tolist(), *answer.tolist()])
        log_p = model(ids[None])[0, len(row.prompt) - 1 : -1].double().log_softmax(-1)
        logprobs.append(log_p.gather(1, ids[len(row.prompt) :, None])[:, 0])
        squares.append((2 * log_p).logsumexp(-1))
    return logprobs, squares


def test_scores(model: Decoder) -> None:
    batch = make_answer_batch(ROWS)
    scores = score_answers(model, batch, squares=True)
    assert scores.sums_A.dtype == torch.float64 and scores.squares_N is not None
    both = [separate(model, row) for row in ROWS]
    logprobs, squares = ([of for row in both for of in row[part]] for part in (0, 1))
    torch.testing.assert_close(scores.sums_A, torch.stack([of.sum() for of in logprobs]), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(scores.squares_N.double(), torch.cat(squares), rtol=1e-5, atol=1e-5)
    assert scores.sizes_A.tolist() == [len(answer) for row in ROWS for answer in row.answers]


@pytest.mark.parametrize("weighted", [False, True])
def test_trl(model: Decoder, weighted: bool) -> None:
    """Loss, gradients and metrics are TRL's of separate padded sequences, its mixture of losses too."""
    pytest.importorskip("trl")
    from . import trl_parts

    both = [separate(model, row) for row in ROWS]
    parts = [[row[part][side] for side in (0, 1) for row in both] for part in (0, 1)]
    longest = max(map(len, parts[0]))
    logprobs, squares = (torch.stack([pad(of, (0, longest - len(of))) for of in part]) for part in parts)
    mask = torch.stack([pad(torch.ones(len(of)), (0, longest - len(of))) for of in parts[0]]).long()
    references = torch.tensor([row.reference[side] for side in (0, 1) for row in ROWS], dtype=torch.float64)
    tokens = trl_parts.Tokens(logprobs, squares.detach(), mask, references)
    names, weights = (["sigmoid", "apo_zero", "sft"], [0.7, 0.2, 0.4]) if not weighted else (["sigmoid"], [1.0])
    theirs, trainer = trl_parts.dpo(tokens, names, weights, use_weighting=weighted)
    loss = PreferenceLoss(terms=tuple(zip(names, weights, strict=True)), weighted=weighted)
    found, grads = step(model, loss, [make_answer_batch(ROWS)])
    assert found["loss"] == pytest.approx(theirs.item(), rel=1e-5) and found["scaled"] == pytest.approx(found["loss"])
    close(grads, list(torch.autograd.grad(theirs, list(model.parameters()))))
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    for ours, name in {
        "rewards_chosen": "rewards/chosen",
        "rewards_rejected": "rewards/rejected",
        "accuracy": "rewards/accuracies",
        "margin": "rewards/margins",
        "logps_chosen": "logps/chosen",
        "logps_rejected": "logps/rejected",
    }.items():
        assert found[ours] == pytest.approx(metrics[name], rel=1e-5), ours


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_the_split_and_the_packing_change_nothing(model: Decoder, name: str) -> None:
    """One micro-batch, several in another order, and copies of the prompts."""
    options = Options(beta=0.2, label_smoothing=0.1)
    loss = PreferenceLoss(terms=((name, 1.0),), options=options, sft_loss_ratio=0.3)
    loss.note({"border": -1.0}, 2.0)
    whole, grads = step(model, loss, [make_answer_batch(ROWS)])
    order = [3, 0, 4, 2, 1]
    for sizes, share in (((1, 2, 2), True), ((5,), False), ((4, 1), False)):
        rows, batches = iter([ROWS[at] for at in order]), []
        for size in sizes:
            batches.append(make_answer_batch([next(rows) for _ in range(size)], share=share))
        found, other = step(model, loss, batches)
        assert found == pytest.approx(whole, rel=1e-5, abs=1e-6)
        close(other, grads)
    assert any(float(grad.abs().max()) > 0 for grad in grads)


def test_unpaired_transport_has_the_gradient_of_the_sorted_sum(model: Decoder) -> None:
    """Of both sides of each term, though each micro-batch knows one as a constant."""
    loss = PreferenceLoss(terms=(("aot_unpaired", 1.0),), options=Options(beta=0.2))
    _, grads = step(model, loss, [make_answer_batch(ROWS[:2]), make_answer_batch(ROWS[2:])])
    pairs = pairs_of(model, ROWS)
    margin = pairs.chosen_ratio.sort().values - pairs.rejected_ratio.sort().values
    expected = -torch.nn.functional.logsigmoid(0.2 * margin).mean()
    close(grads, list(torch.autograd.grad(expected, list(model.parameters()))))


def pairs_of(model: Decoder, rows: list[Answered]) -> Pairs:
    sums = [[of.sum() for of in separate(model, row)[0]] for row in rows]
    sides = [torch.stack([row[side] for row in sums]) for side in (0, 1)]
    references = [torch.tensor([row.reference[side] for row in rows], dtype=torch.float64) for side in (0, 1)]
    return Pairs(*sides, *references, *(torch.ones(len(rows), dtype=torch.float64) for _ in (0, 1)))


def test_nll_is_per_token_of_the_step(model: Decoder) -> None:
    loss = PreferenceLoss(sft_loss_ratio=2.0, pref_loss_ratio=0.0)
    found, _ = step(model, loss, [make_answer_batch(ROWS[:1]), make_answer_batch(ROWS[1:])])
    tokens = torch.cat([separate(model, row)[0][0] for row in ROWS])
    assert found["nll"] == pytest.approx(-float(tokens.mean()), rel=1e-6)
    assert found["loss"] == pytest.approx(2 * found["nll"])


def test_reference_free(model: Decoder) -> None:
    """The same as references of 0; batches need none."""
    free, _ = step(model, PreferenceLoss(reference_free=True), [make_answer_batch(random_answers(3, reference=None))])
    rows = [Answered(r.prompt, r.answers, r.labels, r.where, reference=(0.0, 0.0)) for r in random_answers(3)]
    with_zeros, _ = step(model, PreferenceLoss(), [make_answer_batch(rows)])
    assert free["loss"] != 0 and "kl" not in free
    rows_free = [Answered(r.prompt, r.answers, r.labels, r.where) for r in rows]
    again, _ = step(model, PreferenceLoss(reference_free=True), [make_answer_batch(rows_free)])
    assert again["loss"] == with_zeros["loss"]


def test_unknown_references_are_noticed(model: Decoder) -> None:
    with pytest.raises(AssertionError, match="made:0"):
        PreferenceLoss()(model, make_answer_batch(random_answers(2, reference=None)), 1.0)


def test_evaluation_takes_the_set_as_one_step(model: Decoder) -> None:
    loss = PreferenceLoss(terms=(("aot", 1.0),))
    results = [
        evaluate(model, loss, [make_answer_batch(ROWS[a:b]) for a, b in borders])
        for borders in (((0, 5),), ((0, 2), (2, 5)))
    ]
    assert results[0].loss == pytest.approx(results[1].loss, rel=1e-6) and results[0].accuracy == results[1].accuracy


def test_single_answers_are_refused(model: Decoder) -> None:
    with pytest.raises(AssertionError, match="two answers"):
        PreferenceLoss()(model, make_answer_batch(random_answers(2, labels=(1.0,))), 1.0)


@pytest.mark.parametrize("share", [True, False])
def test_only_some_answers(model: Decoder, share: bool) -> None:
    """What is left out leaves no trace: the batch is the one that is made without it."""
    batch = make_answer_batch(ROWS, share=share)
    keep = [0, 3, 4, 5, 9]
    rows = [
        Answered(row.prompt, tuple(row.answers[i] for i in kept), (0.0,) * len(kept), row.where, row.margin)
        for number, row in enumerate(ROWS)
        if (kept := [i for i in (0, 1) if 2 * number + i in keep])
    ]
    expected, found = (
        make_answer_batch(rows, share=share),
        only(batch, torch.isin(torch.arange(10), torch.tensor(keep))),
    )
    same: Any = ("bounds", "num_tokens", "num_trained", "where", "bounds_E")
    assert [getattr(found, name) for name in same] == [getattr(expected, name) for name in same]
    tensors = "input_ids positions targets weights source_E predictors_N predicted_N answers_N prompts_A margins_A"
    for name in tensors.split():
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert only(batch, torch.ones(10, dtype=torch.bool)) is batch


def test_a_step_moves_the_border_once_it_is_applied() -> None:
    """bco_pair's: the mean reward of the steps before, saved and restored."""
    model = tiny_decoder()
    optimizer = AdamW(model.named_parameters(), AdamWSettings())
    loss = PreferenceLoss(terms=(("bco_pair", 1.0),))
    batches = [make_answer_batch(ROWS[:2]), make_answer_batch(ROWS[2:])]
    before = score_answers(model, make_answer_batch(ROWS)).sums_A.detach()
    references = torch.tensor([of for row in ROWS for of in row.reference], dtype=torch.float64)
    with pytest.raises(RuntimeError, match="no further"):
        run_step(model, loss, batches, optimizer, lr=1e-3, max_grad_norm=1.0, inspect=_stop)
    assert loss.state() == {"reward_total": 0.0, "reward_count": 0.0}
    run_step(model, loss, batches, optimizer, lr=1e-3, max_grad_norm=1.0)
    state = loss.state()
    assert state["reward_count"] == 5
    assert state["reward_total"] / 5 == pytest.approx(0.1 * float((before - references).mean()), rel=1e-6)
    run_step_in_backward(model, loss, batches[0], optimizer, lr=1e-3)
    assert loss.state()["reward_count"] == 7
    again = PreferenceLoss(terms=(("bco_pair", 1.0),))
    again.load_state(loss.state())
    assert again(model, batches[1], 1.0).total == loss(model, batches[1], 1.0).total != 0


def _stop(result: object) -> None:
    raise RuntimeError("no further")
