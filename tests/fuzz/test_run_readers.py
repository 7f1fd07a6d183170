"""Readers of run folders against damaged files: checkpoints, logs, settings, and steps that were kept for replay."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from corpora import pretrain_words, write_blank_model, write_corpus
from fuzz.damage import Reader, fuzz
from oarsmith import cli
from oarsmith.config.load import load_config
from oarsmith.config.replay import ReplayConfig
from oarsmith.jobs import replay
from oarsmith.training.checkpoint import CheckpointStore, read_checkpoint
from oarsmith.training.forensics import only_document, read_step
from oarsmith.training.log import RunLog
from oarsmith.training.report import render
from oarsmith.training.run_folder import open_run
from oarsmith.training.run_parts import read_run

SIZES = {"vocab_size": 1152, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}


def read_saved(folder: Path) -> None:
    """As a resumed run does."""
    store = CheckpointStore(folder, keep=None)
    settings = json.loads((folder.parent / "settings.json").read_text())
    checkpoint = open_run(folder, settings, overwrite=False, resume="auto", store=store)
    if checkpoint is not None:
        read_checkpoint(checkpoint)
        RunLog(folder).rewind(2)


def read_reported(folder: Path) -> None:
    render(read_run(folder), b"")


def read_kept(folder: Path) -> None:
    step = read_step(folder)
    only_document(step.batches, 0)
    replay.run(load_config(ReplayConfig, None, [f"--step_dir={folder}"]))


KINDS: dict[str, tuple[str, str]] = {
    "run settings": ("resume", "run.json"),
    "run log": ("resume", "log.jsonl"),
    "manifest": ("resume", "checkpoint-3/manifest.json"),
    "trainer state": ("resume", "checkpoint-3/trainer/state.json"),
    "optimizer": ("resume", "checkpoint-3/trainer/optimizer.safetensors"),
    "reported settings": ("report", "run.json"),
    "reported log": ("report", "log.jsonl"),
    "timing": ("report", "timing.jsonl"),
    "data report": ("report", "data_report.json"),
    "environment": ("report", "environment.json"),
    "kept report": ("step", "report.json"),
    "kept documents": ("step", "documents.jsonl"),
    "kept batch": ("step", "batch.safetensors"),
    "kept settings": ("step", "run.json"),
    "kept weights": ("step", "weights/model.safetensors"),
}


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reader]:
    """A run of three steps, of which the last diverges at once on the next start."""
    root = tmp_path_factory.mktemp("run")
    model, corpus = write_blank_model(root / "model", **SIZES), write_corpus(root / "text")
    keys = {"max_length": 24, "per_device_train_batch_size": 2, "split": "8,2", "logging_steps": 1, "max_steps": 3}
    assert cli.main(pretrain_words(model, corpus, root / "run", **keys)) == 0
    steep = keys | {"learning_rate": 1e30, "max_grad_norm": 0, "save_strategy": "no"}
    assert cli.main(pretrain_words(model, corpus, root / "failed", **steep)) == 2
    (step,) = (root / "failed").glob("failure-step-*")
    folders = {
        "resume": (root / "run", read_saved),
        "report": (root / "run", read_reported),
        "step": (step, read_kept),
    }
    return {kind: Reader(folders[what][0], file, folders[what][1]) for kind, (what, file) in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(kind: str, readers: dict[str, Reader], tmp_path: Path, few_threads: None) -> None:
    settings = json.loads((readers["run settings"].folder / "run.json").read_text())
    (tmp_path / "settings.json").write_text(json.dumps({k: v for k, v in settings.items() if k != "oarsmith"}))
    fuzz(readers[kind], tmp_path, 1 / len(KINDS))
