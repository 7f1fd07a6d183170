"""From a configuration to the batches of a run."""

import json
from dataclasses import asdict

import pytest

import oarsmith
from oarsmith.config.load import load_config
from oarsmith.config.sft import SftConfig
from oarsmith.errors import DataError
from oarsmith.jobs.loop_parts import total_steps
from oarsmith.methods.sft import build_data, sample_options
from oarsmith.text.choose import with_named_template
from tiny import TOKENIZER, write_rows


@pytest.fixture(scope="module")
def tokenizer():
    return with_named_template(oarsmith.load_tokenizer(TOKENIZER), "chatml")


def config(data, **keys):
    words = [f"--{key}={value}" for key, value in {"max_length": 64, **keys}.items()]
    return load_config(SftConfig, None, [TOKENIZER.as_posix(), str(data), *words]).config


def rows_of(batches):
    return {where for batch in batches for where in batch.where}


def test_options_are_the_configured_ones(tmp_path):
    keys = {"src_length": 20, "train_on": "last", "on_malformed": "skip", "max_dropped_fraction": 0.5}
    options = sample_options(config(tmp_path / "rows.jsonl", dataset_format="src_tgt", **keys))
    assert (options.max_length, options.dataset_format) == (64, "src_tgt")
    assert asdict(options).items() >= keys.items()
    assert sample_options(config(tmp_path / "rows.jsonl")).dataset_format is None


def test_split_is_by_rows_and_repeatable(tokenizer, tmp_path):
    """Documents cut into several samples stay on one side."""
    rows = tmp_path / "text.jsonl"
    rows.write_text("".join(json.dumps({"text": f"{n} " + "many words follow " * 60}) + "\n" for n in range(10)))
    data = build_data(config(rows, eval_split_ratio=0.3, seed=5), tokenizer)
    held_out, train = rows_of(data.evaluation()), rows_of(data.train)
    assert len(held_out) == 3
    assert not held_out & train
    assert len(held_out | train) == 10
    assert rows_of(build_data(config(rows, eval_split_ratio=0.3, seed=5), tokenizer).evaluation()) == held_out
    assert rows_of(build_data(config(rows, eval_split_ratio=0.3, seed=6), tokenizer).evaluation()) != held_out


def test_a_split_that_leaves_nothing(tokenizer, tmp_path):
    with pytest.raises(DataError, match="leaves nothing of 1 rows"):
        build_data(config(write_rows(tmp_path / "rows.jsonl", 1), eval_split_ratio=0.5), tokenizer)


def test_named_evaluation_rows(tokenizer, tmp_path):
    train, other = write_rows(tmp_path / "a.jsonl", 6), write_rows(tmp_path / "b.jsonl", 4, first=50)
    data = build_data(config(train, eval_dataset_path=other), tokenizer)
    assert {where.split(":")[0] for where in rows_of(data.evaluation())} == {str(other)}
    assert set(data.reports) == {"train", "eval"}
    assert any("evaluation" in line and "4 rows read" in line for line in data.lines)


def test_a_folder_with_train_and_dev(tokenizer, tmp_path):
    write_rows(tmp_path / "train.jsonl", 6)
    write_rows(tmp_path / "dev.jsonl", 3, first=50)
    data = build_data(config(tmp_path, evaluation_strategy="epoch"), tokenizer)
    assert len(rows_of(data.train)) == 6
    assert len(rows_of(data.evaluation())) == 3
    assert build_data(config(tmp_path, evaluation_strategy="no"), tokenizer).evaluation is None


def test_evaluation_batches_are_the_same_each_time(tokenizer, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", 20)
    data = build_data(config(rows, eval_split_ratio=0.5, per_device_eval_batch_size=2), tokenizer)
    again = data.evaluation
    assert [batch.input_ids.tolist() for batch in again()] == [batch.input_ids.tolist() for batch in again()]


@pytest.mark.parametrize(("zero_padding", "documents"), [(True, 2), (False, 1)])
def test_rows_are_packed_or_one_sample_each(tokenizer, tmp_path, zero_padding, documents):
    rows = write_rows(tmp_path / "rows.jsonl", 12)
    keys = {"per_device_train_batch_size": 1, "max_length": 128}
    data = build_data(config(rows, zero_padding=zero_padding, **keys), tokenizer)
    sizes = [len(batch.where) for batch in data.train]
    assert max(sizes) >= documents
    assert (max(sizes) == 1) is not zero_padding
    assert sum(sizes) == 12


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"num_train_epochs": 2}, 12),
        ({"num_train_epochs": 1.5}, 9),
        ({"num_train_epochs": 0.01}, 1),
        ({"num_train_epochs": 2, "gradient_accumulation_steps": 4}, 4),
        ({"num_train_epochs": 2, "max_steps": 5}, 5),
    ],
)
def test_total_steps(tokenizer, tmp_path, keys, expected):
    """12 rows of one sample, 2 a batch: 6 batches an epoch; with 4 passes an update takes the last 2 alone."""
    chosen = config(write_rows(tmp_path / "rows.jsonl", 12), zero_padding=False, per_device_train_batch_size=2, **keys)
    assert total_steps(chosen, build_data(chosen, tokenizer).train) == expected


def test_an_evaluation_can_be_cut_short(tokenizer, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", 20)
    keys = {"eval_split_ratio": 0.5, "per_device_eval_batch_size": 1}
    whole = list(build_data(config(rows, **keys), tokenizer).evaluation())
    short = list(build_data(config(rows, **keys, max_evaluate_steps=2), tokenizer).evaluation())
    assert len(whole) > 2
    assert [batch.input_ids.tolist() for batch in short] == [batch.input_ids.tolist() for batch in whole[:2]]


def test_test_rows_come_from_their_own_file(tokenizer, tmp_path):
    for name, first in (("train", 0), ("dev", 100), ("test", 200)):
        write_rows(tmp_path / f"{name}.jsonl", 6, first)
    data = build_data(config(tmp_path, do_predict=True), tokenizer)
    assert {where.split(":")[0] for where in rows_of(data.test())} == {str(tmp_path / "test.jsonl")}
    assert "test" in data.reports
    assert build_data(config(tmp_path), tokenizer).test is None
