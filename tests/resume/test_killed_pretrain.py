"""Pretraining killed and continued, with every part of the trainer that remembers something or draws random numbers.

Two to four random moments each; the end is bitwise that of the uninterrupted run: weights, averages, states, log.
"""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from corpora import pretrain_words, write_blank_model, write_corpus
from oarsmith.training.precision import has_fast_bf16
from resume.killing import finish, kill, same, steps_saved
from tiny import read_lines, write_tiny_model

WIDE = "bf16" if has_fast_bf16(torch.device("cpu")) else "fp32"
KEYS: dict[str, Any] = {
    "max_length": 32,
    "per_device_train_batch_size": 2,
    "max_steps": 24,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 3,
    "weight_decay": 0.1,
    "logging_steps": 1,
    "save_steps": 3,
    "save_total_limit": 2,
    "split": "8,2",
    "evaluation_strategy": "no",
    "seed": 7,
}
STEPS_OF_EVALUATION = {"evaluation_strategy": "steps", "max_evaluate_steps": 2}
PROJECTED = {"projection_rank": 8, "projection_steps": 5}


@dataclass(frozen=True)
class Case:
    """Keys of a run, which corpus and model it has, and what its log must show so that the case means something."""

    keys: dict[str, Any] = field(default_factory=dict)
    corpus: str = "text"
    model: str = "blank"
    kills: int = 2
    most_lines: int = 9


CASES: dict[str, Case] = {
    "one corpus": Case(kills=4, most_lines=5),
    "mid-epoch of several, passes added up": Case(
        {"max_steps": -1, "num_train_epochs": 4, "gradient_accumulation_steps": 3, "save_steps": 2},
        corpus="short",
        kills=3,
        most_lines=6,
    ),
    "mid-blend, documents apart": Case({"isolate_documents": True}, corpus="blend", kills=4, most_lines=5),
    "from trained weights": Case(model="trained"),
    "bf16": Case({"dtype": WIDE}),
    "saves in the background": Case({"use_async_save": True, "dtype": WIDE}, kills=4, most_lines=5),
    "updates in backward": Case({"optimizer_in_backward": True, "max_grad_norm": 0, "dtype": WIDE}),
    "adamw_8bit": Case({"optim": "adamw_8bit", "dtype": WIDE}),
    "adamw_mini": Case({"optim": "adamw_mini"}),
    "adafactor": Case({"optim": "adafactor", "dtype": WIDE}),
    "muon": Case({"optim": "muon", "dtype": WIDE}),
    # The projection is renewed at step 6, 11, ...: between a checkpoint (every third) and the kill, and after both.
    "galore": Case({"optim": "galore", **PROJECTED}),
    "apollo": Case({"optim": "apollo", **PROJECTED}),
    "apollo_mini": Case({"optim": "apollo_mini", "projection_steps": 5}),
    "averaged weights": Case({"ema_decay": 0.9, "eval_steps": 4, "dtype": WIDE, **STEPS_OF_EVALUATION}),
    "fp16 whose scale falls": Case({"dtype": "fp16", "scale_loss": 2.0**32}),
    "noise on the embeddings": Case({"neftune": True, "gradient_accumulation_steps": 2}),
    "skipping positions": Case(
        {"use_pose_convert": True, "rope_scaling_type": "yarn", "rope_scaling_factor": 4}, model="trained"
    ),
    "shifted groups, recomputed": Case({"use_ssa": True, "recompute": True, "neftune": True}),
    # The highest loss is the first one, whatever the machine: the run ends with a checkpoint that outlived its limit.
    "the best at the end": Case(
        {"load_best_model_at_end": True, "greater_is_better": True, "eval_steps": 3, "save_total_limit": 1}
        | STEPS_OF_EVALUATION
    ),
    # No evaluation is better by so much, so the run ends after the fifth.
    "stopping early": Case(
        {"early_stopping_patience": 4, "early_stopping_threshold": 3.0, "eval_steps": 2} | STEPS_OF_EVALUATION,
        most_lines=6,
    ),
    "steps kept as odd": Case(
        {"max_steps": 90, "per_device_train_batch_size": 1, "learning_rate": 1e-2, "save_steps": 10}
        | {"lr_scheduler_type": "constant", "warmup_steps": 0},
        corpus="odd",
        most_lines=40,
    ),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and corpora by name."""
    folder = tmp_path_factory.mktemp("inputs")
    write_blank_model(folder / "blank")
    write_tiny_model(folder / "trained")
    write_corpus(folder / "text")
    write_corpus(folder / "short", documents=20, seed=1)
    write_corpus(folder / "odd", documents=60, seed=2, odd=2)
    return folder


def words(inputs: Path, output_dir: Path, case: Case, **changes: Any) -> list[str]:
    blend = f"0.3 {inputs / 'text'} 0.7 {inputs / 'short'}"
    corpus = blend if case.corpus == "blend" else inputs / case.corpus
    return pretrain_words(inputs / case.model, corpus, output_dir, **KEYS | case.keys | changes)


def tell(inputs: Path, folder: Path, name: str) -> tuple[Path, Path]:
    """Folders of the undisturbed run and of the killed one, made side by side."""
    case, chance = CASES[name], random.Random(name)
    whole, killed = folder / "whole", folder / "killed"
    with ThreadPoolExecutor(1) as beside:
        undisturbed = beside.submit(finish, words(inputs, whole, case), whole)
        kills = 0
        while kills < case.kills or not steps_saved(killed):
            kill(words(inputs, killed, case), killed, chance, most_lines=case.most_lines)
            kills += 1
        printed = finish(words(inputs, killed, case), killed)
        undisturbed.result()
    assert "resuming from" in printed
    return whole, killed


@pytest.mark.parametrize("name", CASES)
def test_killed_run_ends_as_the_undisturbed_one(inputs: Path, tmp_path: Path, name: str) -> None:
    whole, killed = tell(inputs, tmp_path, name)
    same(whole, killed)
    assert shows_what_it_is_for(name, whole), (whole / "log.jsonl").read_text()


def shows_what_it_is_for(name: str, folder: Path) -> bool:
    """Whether what a case is about took place in its run."""
    log = read_lines(folder / "log.jsonl")
    losses = [record["loss"] for record in log if "loss" in record]
    last = log[-1]["step"]
    match name:
        case "mid-epoch of several, passes added up":
            return log[-1]["epoch"] == 4.0 and last % 4 == 0 and last >= 8
        case "mid-blend, documents apart":
            drawn = json.loads((folder / "data_report.json").read_text())["train"]["components"]
            return len(drawn) == 2 and max(part["epochs"] for part in drawn) > 1
        case "fp16 whose scale falls":
            return any(record.get("event") == "skipped" for record in log)
        case "averaged weights":
            return (folder / "model-ema" / "model.safetensors").is_file()
        case "the best at the end":
            return json.loads((folder / f"checkpoint-{last}/trainer/state.json").read_text())["run"]["best_step"] == 3
        case "stopping early":
            return last == 10 and steps_saved(folder)[-1] == last
        case "steps kept as odd":
            return any(folder.glob("spike-step-*")) and last == 90
    return last == 24 and losses[-1] < losses[0] - 0.1
