"""What only watches a run changes nothing in it: evaluations, checkpoints, kept steps, averages, a finer log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from corpora import pretrain_words, write_blank_model, write_corpus
from oarsmith import cli
from tiny import read_lines

# Noise draws random numbers in every step: something that draws as well would show.
KEYS: dict[str, Any] = {
    "max_length": 32,
    "per_device_train_batch_size": 1,
    "max_steps": 90,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "gradient_accumulation_steps": 1,
    "neftune": True,
    "neftune_noise_alpha": 0.1,
    "split": "8,2",
    "evaluation_strategy": "no",
    "save_strategy": "no",
    "loss_spike_factor": 0,
    "seed": 7,
}
WATCHERS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "evaluations": {"evaluation_strategy": "steps", "eval_steps": 7},
    "checkpoints": {"save_strategy": "steps", "save_steps": 9},
    "background": {"save_strategy": "steps", "save_steps": 9, "use_async_save": True},
    "odd steps kept": {"loss_spike_factor": 2},
    "averages": {"ema_decay": 0.9, "evaluation_strategy": "steps", "eval_steps": 20},
    "every step logged": {"logging_steps": 1},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    model = write_blank_model(folder / "model")
    corpus = write_corpus(folder / "odd", documents=60, seed=2, odd=2)
    for name, keys in WATCHERS.items():
        assert cli.main(pretrain_words(model, corpus, folder / name, **KEYS | keys)) == 0
    return {name: folder / name for name in WATCHERS}


@pytest.mark.parametrize("name", [name for name in WATCHERS if name != "nothing"])
def test_weights_are_those_of_a_run_nobody_watched(runs: dict[str, Path], name: str) -> None:
    weights = [(runs[which] / "model" / "model.safetensors").read_bytes() for which in (name, "nothing")]
    assert weights[0] == weights[1]


def test_there_was_something_to_watch(runs: dict[str, Path]) -> None:
    assert any(runs["odd steps kept"].glob("spike-step-*"))
    assert not any(runs["nothing"].glob("spike-step-*"))
    counts = {name: len(read_lines(folder / "log.jsonl")) for name, folder in runs.items()}
    assert counts["evaluations"] > counts["nothing"] and counts["every step logged"] == 90
