"""Batches in which a prompt lies once: what predicts what, and that nothing is lost against whole documents."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from oarsmith.data.answers import Answered, make_answer_batch, with_references
from oarsmith.data.rows import fingerprint_of


def ids(*values):
    return np.asarray(values, np.int32)


PAIR = Answered(ids(5, 6, 7), (ids(11, 12), ids(21, 22, 23)), (1.0, 0.0), "rows:1", margin=0.5)
SINGLE = Answered(ids(8), (ids(31, 32, 33, 34),), (0.0,), "rows:2")


def random_rows(num, seed=0, answers=2):
    rng = np.random.default_rng(seed)

    def some():
        return rng.integers(1, 90, int(rng.integers(1, 12))).astype(np.int32)

    return [
        Answered(some(), tuple(some() for _ in range(answers)), (1.0, 0.0)[:answers], f"rows:{n + 1}")
        for n in range(num)
    ]


def test_a_pair_by_hand():
    batch = make_answer_batch([PAIR, SINGLE])
    assert batch.input_ids.tolist() == [5, 6, 7, 11, 12, 21, 22, 23, 8, 31, 32, 33, 34]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 2, 3, 4]
    assert batch.bounds == (0, 8, 13) and batch.bounds_E == (0, 5, 11, 16)
    assert batch.source_E.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8, 9, 10, 11, 12]
    # The prompt's last token predicts the first of both answers.
    assert batch.predictors_N.tolist() == [2, 3, 2, 5, 6, 8, 9, 10, 11]
    assert batch.predicted_N.tolist() == [11, 12, 21, 22, 23, 31, 32, 33, 34]
    assert batch.answers_N.tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 2] and batch.prompts_A.tolist() == [0, 0, 1]
    assert batch.weights.tolist() == [0, 0, 2, 1, 0, 1, 1, 0, 1, 1, 1, 1, 0]
    assert batch.labels_A.tolist() == [1, 0, 0] and batch.margins_A.tolist() == [0.5, 0.5, 0]
    assert batch.num_trained == 2 and batch.num_answers == 3 and batch.num_tokens == 13
    assert batch.references_A.isnan().all() and batch.labels_A.dtype == torch.float64


@pytest.mark.parametrize("share", [True, False])
def test_every_document_is_prompt_and_answer_in_order(share):
    rows = random_rows(7)
    batch = make_answer_batch(rows, share=share)
    documents = [np.concatenate([row.prompt, answer]) for row in rows for answer in row.answers]
    assert batch.num_tokens == sum(row.size(share=share) for row in rows)
    assert batch.bounds[-1] == batch.num_tokens and len(batch.bounds) == len(rows) + 1
    for number, document in enumerate(documents):
        places = batch.source_E[batch.bounds_E[number] : batch.bounds_E[number + 1]]
        assert batch.input_ids[places].tolist() == document.tolist()
        assert batch.positions[places].tolist() == list(range(len(document)))
        own = batch.answers_N == number
        answer = [answer for row in rows for answer in row.answers][number]
        assert batch.predicted_N[own].tolist() == answer.tolist()
        assert batch.input_ids[batch.predictors_N[own]].tolist() == document[-len(answer) - 1 : -1].tolist()


def test_what_tools_say_is_read_and_not_predicted():
    mask = np.asarray([True, True, False, False, True])
    row = Answered(ids(1, 2), (ids(3, 4, 5, 6, 7),), (1.0,), "rows:1", spoken=(mask,))
    batch = make_answer_batch([row, PAIR])
    assert batch.predicted_N.tolist() == [3, 4, 7, 11, 12, 21, 22, 23]
    assert batch.predictors_N.tolist()[:3] == [1, 2, 5]
    assert batch.answers_N.tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    assert row.num_trained == 3 and len(row) == 7 and PAIR.num_trained == 5


@pytest.mark.parametrize("share", [True, False])
def test_steps_end_where_they_are_judged(share):
    row = Answered(ids(1, 2), (ids(3, 4, 9, 5, 9),), (np.nan,), "rows:1", step_ends=(2, 4), step_labels=(1.0, 0.25))
    batch = make_answer_batch([SINGLE, row], share=share)
    assert batch.input_ids[batch.step_ends_S].tolist() == [9, 9] and batch.step_ends_S.tolist() == [9, 11]
    assert batch.step_labels_S.tolist() == [1.0, 0.25]
    assert len(make_answer_batch([PAIR]).step_ends_S) == 0


def test_references_belong_to_rows():
    rows = random_rows(3)
    known = np.asarray([[-1.5, -2.25], [-3.0, -1e-17], [-0.1, -7.0]])
    referred = with_references(rows, known)
    assert np.array_equal(make_answer_batch(referred).references_A.numpy(), known.ravel())
    assert fingerprint_of(referred) == fingerprint_of(rows)
    with pytest.raises(AssertionError):
        with_references(rows, known[:2])


def test_everything_else_is_in_the_fingerprint():
    changed = [
        replace(PAIR, prompt=ids(5, 6, 8)),
        replace(PAIR, answers=(ids(11), ids(12, 21, 22, 23))),
        replace(PAIR, labels=(0.0, 1.0)),
        replace(PAIR, margin=0.25),
        replace(PAIR, spoken=(np.asarray([True, False]), np.ones(3, np.bool_))),
        replace(SINGLE, step_ends=(1,), step_labels=(1.0,)),
        replace(SINGLE, step_ends=(2,), step_labels=(1.0,)),
    ]
    assert len({fingerprint_of([row]) for row in (PAIR, SINGLE, *changed)}) == 9


def test_sizes():
    assert (len(PAIR), PAIR.size(share=True), PAIR.size(share=False)) == (8, 8, 11)
    assert len(SINGLE) == SINGLE.size(share=False) == 5
    assert PAIR.highest_id == 23
    with pytest.raises(AssertionError, match="rows:1"):
        make_answer_batch([replace(PAIR, prompt=ids())])
