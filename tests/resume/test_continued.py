"""Runs continued otherwise than they began: other save intervals, another folder, more steps, stopped while saving."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from corpora import pretrain_words, write_blank_model, write_corpus
from oarsmith import cli
from oarsmith.training.checkpoint import read_checkpoint
from resume.killing import Run, check_checkpoints, finish, is_saving, kill, num_lines, printed_of, same, steps_saved
from tiny import read_lines

KEYS: dict[str, Any] = {
    "max_length": 32,
    "per_device_train_batch_size": 2,
    "max_steps": 24,
    "learning_rate": 3e-3,
    "warmup_steps": 2,
    "lr_scheduler_type": "constant_with_warmup",
    "logging_steps": 1,
    "save_steps": 3,
    "split": "8,2",
    "evaluation_strategy": "no",
    "ema_decay": 0.9,
    "seed": 3,
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_blank_model(folder / "model")
    write_corpus(folder / "text")
    write_corpus(folder / "short", documents=20, seed=1)
    return folder


def words(inputs: Path, output_dir: Path, **changes: Any) -> list[str]:
    return pretrain_words(
        inputs / "model", f"0.3 {inputs / 'text'} 0.7 {inputs / 'short'}", output_dir, **KEYS | changes
    )


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    finish(words(inputs, folder), folder)
    return folder


def test_other_save_intervals(inputs: Path, whole: Path, tmp_path: Path) -> None:
    """A new interval, and another way to save, with every life of the run."""
    chance, folder = random.Random(0), tmp_path / "run"
    for save_steps, background in ((2, False), (5, True), (3, False)):
        changes = {"save_steps": save_steps, "use_async_save": background, "save_total_limit": 2}
        kill(words(inputs, folder, **changes), folder, chance, most_lines=6)
    assert "resuming from" in finish(words(inputs, folder, save_steps=7, save_strategy="steps"), folder)
    same(whole, folder, checkpoints=False)


def test_in_another_place(inputs: Path, whole: Path, tmp_path: Path) -> None:
    chance, first, second = random.Random(1), tmp_path / "first", tmp_path / "a" / "second"
    while not steps_saved(first):
        kill(words(inputs, first), first, chance, most_lines=9)
    second.parent.mkdir()
    first.rename(second)
    assert "resuming from" in finish(words(inputs, second), second)
    same(whole, second)
    assert not first.exists()


def test_longer_than_planned(inputs: Path, whole: Path, tmp_path: Path) -> None:
    """Planned for 9 steps the corpus is laid out for fewer epochs; its samples come in the same order all the same."""
    assert cli.main(words(inputs, tmp_path / "run", max_steps=9)) == 0
    drawn = [
        json.loads((folder / "data_report.json").read_text())["train"]["components"]
        for folder in (tmp_path / "run", whole)
    ]
    assert drawn[0][1]["epochs"] < 1 < drawn[1][1]["epochs"], "the longer run needs another epoch of a file"
    assert cli.main(words(inputs, tmp_path / "run", resume_from_checkpoint=tmp_path / "run" / "checkpoint-9")) == 0
    same(whole, tmp_path / "run")


def test_longer_in_a_folder_of_its_own(inputs: Path, whole: Path, tmp_path: Path) -> None:
    """The checkpoint's weights, states and place; the new folder's log begins behind them."""
    assert cli.main(words(inputs, tmp_path / "run", resume_from_checkpoint=whole / "checkpoint-12")) == 0
    for name in ("model", "model-ema"):
        files = [folder / name / "model.safetensors" for folder in (whole, tmp_path / "run")]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert read_lines(tmp_path / "run" / "log.jsonl") == read_lines(whole / "log.jsonl")[12:]


@pytest.mark.parametrize("damage", ["removed", "cut off"])
def test_with_the_index_of_samples_lost(inputs: Path, whole: Path, tmp_path: Path, damage: str) -> None:
    """It is built anew, and the same."""
    copied = tmp_path / "inputs"
    shutil.copytree(inputs, copied)
    assert cli.main(words(copied, tmp_path / "run", max_steps=9)) == 0
    if damage == "removed":
        shutil.rmtree(copied / "index-cache")
    else:
        for file in (copied / "index-cache").glob("*_sample_idx.npy"):
            file.write_bytes(file.read_bytes()[:-1])
    assert cli.main(words(copied, tmp_path / "run", resume_from_checkpoint=tmp_path / "run" / "checkpoint-9")) == 0
    same(whole, tmp_path / "run")


@pytest.mark.parametrize("background", [False, True])
def test_asked_to_end_during_a_save(inputs: Path, whole: Path, tmp_path: Path, background: bool) -> None:
    folder = tmp_path / "run"
    arguments = words(inputs, folder, use_async_save=background)
    run = Run(arguments, printed_of(folder))
    run.wait_until(lambda: num_lines(folder) > 3 and is_saving(folder))
    assert run.end(signal.SIGTERM) == 143, run.output()
    assert "stopped: saved at step" in run.output()
    check_checkpoints(folder)
    assert steps_saved(folder)[-1] == read_lines(folder / "log.jsonl")[-1]["step"] < 24
    assert "resuming from" in finish(arguments, folder)
    same(whole, folder, checkpoints=False)


def test_asked_to_end_where_only_the_stop_keeps_an_evaluation(inputs: Path, tmp_path: Path) -> None:
    """Every step is evaluated and every sixth kept: a stop in between saves, but chooses no best."""
    keys = {"max_steps": 12, "eval_steps": 1, "save_steps": 6, "evaluation_strategy": "steps", "max_evaluate_steps": 4}
    # The highest loss is the first, so an evaluation that a stop happens to keep would be the best of all.
    keys |= {"load_best_model_at_end": True, "greater_is_better": True}
    finish(words(inputs, tmp_path / "whole", **keys), tmp_path / "whole")
    folder = tmp_path / "run"
    run = Run(words(inputs, folder, **keys), printed_of(folder))
    run.wait_until(lambda: num_lines(folder) >= 1)
    status = run.end(signal.SIGTERM)
    assert status == 143, run.output()
    stopped = steps_saved(folder)
    assert "resuming from" in finish(words(inputs, folder, **keys), folder)
    best = [
        json.loads((place / "checkpoint-12" / "trainer" / "state.json").read_text())["run"]["best_step"]
        for place in (tmp_path / "whole", folder)
    ]
    assert best[0] == best[1], f"stopped at {stopped}: {best}"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB: two checkpoints fit, three do not."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    mounted = mount and subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode != 0:
        pytest.skip("mounting a small disk is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_while_saving_in_the_background(inputs: Path, whole: Path, small_disk: Path) -> None:
    """The run ends with an error; what was saved before is whole, and with more room the run goes on from it."""
    folder = small_disk / "run"
    arguments = words(inputs, folder, use_async_save=True)
    run = Run(arguments, small_disk.parent / "printed.txt")
    assert run.end() == 2, run.output()
    assert "the disk is full" in run.output() and "nothing that was there before has been touched" in run.output()
    check_checkpoints(folder)
    kept = steps_saved(folder)
    assert kept and kept[-1] < 24
    assert not is_saving(folder)
    for step in kept:
        read_checkpoint(folder / f"checkpoint-{step}")
    subprocess.run(["mount", "-o", "remount,size=60m", str(small_disk)], check=True)
    run = Run(arguments, small_disk.parent / "printed.txt")
    assert run.end() == 0 and "resuming from" in run.output(), run.output()
    same(whole, folder)
