"""Rows of preference data by what they are for, in batches that references can be attached to."""

from __future__ import annotations

import json

import numpy as np
import pytest

from oarsmith.config.load import load_config
from oarsmith.config.preferences import PreferenceDataKeys
from oarsmith.config.train import TrainConfig
from oarsmith.data.answers import AnswerBatch, with_references
from oarsmith.errors import DataError
from oarsmith.methods.answers import answer_options, read_rows, training_data
from oarsmith.text import load_tokenizer
from tiny import TOKENIZER


def write(path, num, begin="q"):
    rows = [{"prompt": f"{begin}{n} ", "chosen": "good " * (n % 5 + 1), "rejected": f"bad {n}"} for n in range(num)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def read(source, *words, kind="pair", **keys):
    data = load_config(PreferenceDataKeys, None, ["--dataset_name_or_path", str(source), *words]).config
    training = load_config(
        TrainConfig, None, [word for pair in keys.items() for word in (f"--{pair[0]}", str(pair[1]))]
    )
    options = answer_options(data, kind=kind, mismatched=kind == "point")
    rows = read_rows(data, training.config, load_tokenizer(TOKENIZER), options)
    return rows, training_data(rows, data, training.config)


def test_folders_have_their_parts(tmp_path):
    write(tmp_path / "train.jsonl", 20)
    write(tmp_path / "dev.jsonl", 6, "d")
    write(tmp_path / "test.jsonl", 4, "t")
    rows, data = read(tmp_path, "--max_length", "64", evaluation_strategy="epoch", do_predict=True)
    assert [len(part) for part in (rows.train, rows.evaluation, rows.test)] == [20, 6, 4] and len(rows.all) == 30
    assert set(data.reports) == {"train", "eval", "test"} and any(line.startswith("test: ") for line in data.lines)
    for batches, part in ((data.train, rows.train), (data.evaluation(), rows.evaluation), (data.test(), rows.test)):
        found = list(batches)
        assert all(isinstance(batch, AnswerBatch) and batch.num_tokens <= 8 * 64 for batch in found)
        assert sorted(where for batch in found for where in batch.where) == sorted(row.where for row in part)
    assert max(batch.num_tokens for batch in data.train) <= 64
    assert data.highest_id == max((row.highest_id, row.where) for row in rows.all)


def test_pairs_are_held_out_whole(tmp_path):
    rows, data = read(write(tmp_path / "rows.jsonl", 20), "--eval_split_ratio", "0.25", kind="point")
    train, held_out = ({row.where for row in part} for part in (rows.train, rows.evaluation))
    assert (len(rows.train), len(rows.evaluation)) == (30, 10) and not train & held_out
    assert data.lines[-1] == "evaluation: 10 of these samples are held out" and data.test is None
    limited = read(write(tmp_path / "dev.jsonl", 20), "--eval_split_ratio", "0.5", max_evaluate_steps=1)[1]
    assert len(list(limited.evaluation())) == 1


def test_references_of_all_rows_find_their_place(tmp_path):
    path = write(tmp_path / "rows.jsonl", 12)
    rows, data = read(path, "--eval_dataset_path", str(write(tmp_path / "dev.jsonl", 5, "d")))
    known = np.random.default_rng(0).normal(size=(17, 2))
    train = data.train.with_samples(with_references(rows.train, known[:12]))
    by_row = {row.where: known[number].tolist() for number, row in enumerate(rows.all)}
    for batch in train:
        assert batch.references_A.tolist() == [value for where in batch.where for value in by_row[where]]


def test_nothing_to_train_on(tmp_path):
    with pytest.raises(DataError, match="leaves nothing of 1 rows"):
        read(write(tmp_path / "rows.jsonl", 1), "--eval_split_ratio", "0.5")
