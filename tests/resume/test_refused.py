"""What a run does not go on from: other settings, other data, a damaged checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tiny import read_lines, run_sft, write_rows, write_tiny_model

KEYS: dict[str, Any] = {
    "max_length": 64,
    "per_device_train_batch_size": 4,
    "max_steps": 4,
    "save_steps": 2,
    "logging_steps": 1,
    "lora": True,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model, rows and a finished run."""
    folder = tmp_path_factory.mktemp("finished")
    write_tiny_model(folder / "model")
    write_rows(folder / "rows.jsonl")
    assert run_sft(folder / "model", folder / "rows.jsonl", folder / "run", **KEYS) == 0
    return folder


@pytest.fixture
def place(finished: Path, tmp_path: Path) -> Path:
    """A copy of the run to damage; model and rows stay where they are, for their paths are settings."""
    shutil.copytree(finished / "run", tmp_path / "run")
    return tmp_path


def again(finished: Path, place: Path, **changes: Any) -> int:
    return run_sft(finished / "model", finished / "rows.jsonl", place / "run", **KEYS | changes)


def test_the_same_command_again_has_nothing_left_to_do(finished, place, capsys):
    before = (place / "run" / "log.jsonl").read_bytes()
    assert again(finished, place) == 0
    assert "at step 4 of 4" in capsys.readouterr().out
    assert (place / "run" / "log.jsonl").read_bytes() == before


def test_other_settings(finished, place, capsys):
    assert again(finished, place, learning_rate=1e-5, lora_rank=4) == 2
    message = capsys.readouterr().err
    assert "learning_rate was 0.0002, now 1e-05" in message
    assert "lora_rank was 8, now 4" in message
    assert "resume_from_checkpoint" in message


def test_settings_that_only_show_are_free(finished, place):
    assert again(finished, place, disable_tqdm=True, save_total_limit=1) == 0


def test_going_on_longer_from_a_named_checkpoint(finished, place):
    assert again(finished, place, max_steps=6, resume_from_checkpoint=place / "run" / "checkpoint-4") == 0
    assert [record["step"] for record in read_lines(place / "run" / "log.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_a_checkpoint_that_is_none(finished, place, capsys):
    assert again(finished, place, resume_from_checkpoint=place / "nothing") == 2
    assert "is not a complete checkpoint" in capsys.readouterr().err


def test_none_means_from_the_beginning_and_needs_an_empty_folder(finished, place, capsys):
    assert again(finished, place, resume_from_checkpoint="none") == 2
    assert "already holds checkpoints" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "trainer/optimizer.safetensors", "trainer/state.json", "manifest.json"]
)
def test_a_damaged_file_is_named(finished, place, capsys, name):
    file = place / "run" / "checkpoint-4" / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0xFF
    file.write_bytes(data)
    assert again(finished, place) == 2
    message = capsys.readouterr().err
    assert name in message
    assert "checkpoint-4" in message


def test_a_missing_file_is_named(finished, place, capsys):
    (place / "run" / "checkpoint-4" / "adapter_config.json").unlink()
    assert again(finished, place) == 2
    assert "adapter_config.json" in capsys.readouterr().err


def test_an_earlier_checkpoint_helps(finished, place):
    (place / "run" / "checkpoint-4" / "trainer" / "state.json").unlink()
    assert again(finished, place, resume_from_checkpoint=place / "run" / "checkpoint-2") == 0
    whole = (finished / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert (place / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == whole


def test_changed_data(finished, place, tmp_path, capsys):
    """The same path and settings, but a row differs since the checkpoint."""
    rows = tmp_path / "rows.jsonl"
    shutil.copy(finished / "rows.jsonl", rows)
    saved = json.loads((place / "run" / "run.json").read_text())
    saved["dataset_name_or_path"] = str(rows)
    (place / "run" / "run.json").write_text(json.dumps(saved))
    rows.write_text(rows.read_text().replace("It is 1.", "It is one."))
    assert run_sft(finished / "model", rows, place / "run", **KEYS) == 2
    assert "the data has changed since the checkpoint" in capsys.readouterr().err


def test_overwriting_starts_anew_and_removes_the_old_run(finished, place):
    (place / "run" / "stray.txt").write_text("left by the first run")
    assert again(finished, place, overwrite_output_dir=True, learning_rate=1e-5) == 0
    assert not (place / "run" / "stray.txt").exists()
    assert [record["step"] for record in read_lines(place / "run" / "log.jsonl")] == [1, 2, 3, 4]


def test_a_failed_start_costs_no_finished_run(finished, place, capsys):
    assert run_sft(finished / "model", place / "typo.jsonl", place / "run", **KEYS, overwrite_output_dir=True) == 2
    assert (place / "run" / "adapter" / "adapter_model.safetensors").exists()
