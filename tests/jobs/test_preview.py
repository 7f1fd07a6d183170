"""``oarsmith preview``: the tokens a run would train on."""

import json

import pytest

from oarsmith import cli
from tiny import write_rows, write_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("preview")
    write_tiny_model(place / "model")
    write_rows(place / "rows.jsonl")
    return place


def test_shows_rows_and_their_counts(folder, capsys):
    assert cli.main(["preview", str(folder / "model"), str(folder / "rows.jsonl"), "--count", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count("<|im_start|>assistant") == 2
    assert f"{folder / 'rows.jsonl'}:1: " in out
    assert "legend: trained" in out


def test_long_lines_stay_whole_in_a_pipe(folder, capsys, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"src": "word " * 50, "tgt": "yes [bold]"}) + "\n")
    assert cli.main(["preview", str(folder / "model"), str(rows)]) == 0
    out = capsys.readouterr().out
    assert "word " * 49 in out
    assert "yes [bold]" in out, "text of a row is no markup"


def test_takes_the_configuration_of_a_run(folder, tmp_path, capsys):
    config = tmp_path / "config.json"
    keys = {"model_name_or_path": str(folder / "model"), "dataset_name_or_path": str(folder / "rows.jsonl")}
    config.write_text(json.dumps({**keys, "learning_rate": 1e-4, "lora": True, "train_on": "all"}))
    assert cli.main(["preview", str(config), "--count", "1"]) == 0
    captured = capsys.readouterr()
    assert "legend: trained" in captured.out


def test_a_row_left_out_is_named(folder, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"src": "a", "tgt": ""}\n')
    assert cli.main(["preview", str(folder / "model"), str(rows)]) == 0
    assert f"{rows}:1: left out" in capsys.readouterr().out


def test_longer_than_the_model(folder, capsys):
    assert cli.main(["preview", str(folder / "model"), str(folder / "rows.jsonl"), "--max_length", "999"]) == 2
    assert "longer than the model's context of 256 tokens" in capsys.readouterr().err
