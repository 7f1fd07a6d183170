"""Real training processes, killed and continued: the end is bitwise that of the uninterrupted run."""

from __future__ import annotations

import json
import random
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from oarsmith.training.precision import has_fast_bf16
from resume.killing import check_checkpoints, finish, kill, num_lines, results, same
from tiny import command, environment, sft_words, write_rows, write_tiny_model

BF16 = has_fast_bf16(torch.device("cpu"))
KILLS = 20
KEYS: dict[str, Any] = {
    "max_length": 64,
    "per_device_train_batch_size": 2,
    "num_train_epochs": 5,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 5,
    "weight_decay": 0.1,
    "logging_steps": 1,
    "save_steps": 2,
    "save_total_limit": 2,
    "eval_split_ratio": 0.2,
    "evaluation_strategy": "steps",
    "eval_steps": 6,
    "seed": 7,
}
VARIANTS: dict[str, dict[str, Any]] = {
    # Dropout draws random numbers in every step, which a resumed run must draw again.
    "lora-fp32": {"lora": True, "lora_rank": 4, "lora_dropout": 0.1},
    "full-fp32": {"gradient_accumulation_steps": 2, "num_train_epochs": 9},
    "full-bf16": {"dtype": "bf16"},
    "lora-bf16": {"dtype": "bf16", "lora": True, "lora_rank": 4},
}
CHOSEN = [name for name in VARIANTS if BF16 or "bf16" not in name]


@dataclass(frozen=True)
class Story:
    """One variant: the folder of the undisturbed run, that of the killed one, and the moments of the kills."""

    whole: Path
    killed: Path
    moments: list[str]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return write_tiny_model(folder / "model"), write_rows(folder / "rows.jsonl", 30)


@pytest.fixture(scope="module")
def stories(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Story]:
    """All variants, two at a time."""
    root = tmp_path_factory.mktemp("stories")
    kills = {name: KILLS // len(CHOSEN) + (number < KILLS % len(CHOSEN)) for number, name in enumerate(CHOSEN)}

    def tell(name: str) -> Story:
        whole, killed = root / name / "whole", root / name / "killed"
        finish(words(inputs, whole, name), whole)
        chance = random.Random(name)
        moments = [kill(words(inputs, killed, name), killed, chance, most_lines=6) for _ in range(kills[name])]
        finish(words(inputs, killed, name), killed)
        return Story(whole, killed, moments)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(CHOSEN, pool.map(tell, CHOSEN), strict=True))


def words(inputs: tuple[Path, Path], output_dir: Path, name: str, **changes: Any) -> list[str]:
    return sft_words(*inputs, output_dir, **KEYS | VARIANTS[name] | changes)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHOSEN)
def test_killed_run_ends_as_the_undisturbed_one(stories: dict[str, Story], name: str) -> None:
    same(stories[name].whole, stories[name].killed)


@pytest.mark.slow
def test_kills_hit_saves_too(stories: dict[str, Story]) -> None:
    moments = [moment for story in stories.values() for moment in story.moments]
    assert len(moments) == KILLS
    assert moments.count("in a save") >= 3
    # Steps of a tiny model are shorter than its saves, so most random moments lie in or near one.
    assert moments.count("between saves") >= 1


@pytest.mark.slow
def test_the_best_checkpoint_outlives_the_limit(stories: dict[str, Story]) -> None:
    """Evaluation every 6 steps, a checkpoint every 2, two of them kept, and the best whatever its age."""
    for story in stories.values():
        records = [json.loads(line) for line in (story.whole / "log.jsonl").read_text().splitlines()]
        last = max(record["step"] for record in records)
        best = min((record for record in records if "eval_loss" in record), key=lambda record: record["eval_loss"])
        steps = sorted(int(path.name.removeprefix("checkpoint-")) for path in story.whole.glob("checkpoint-*"))
        assert steps[-1] == last
        assert best["step"] in steps
        assert len(steps) in (2, 3)


@pytest.mark.slow
def test_sigterm_saves_and_the_run_goes_on(
    inputs: tuple[Path, Path], stories: dict[str, Story], tmp_path: Path
) -> None:
    arguments = words(inputs, tmp_path / "run", "lora-fp32", save_steps=1000)
    process = subprocess.Popen(
        command(arguments), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while process.poll() is None and num_lines(tmp_path / "run") < 7:
        time.sleep(0.001)
    process.terminate()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 143, output
    assert "stopped: saved at step" in output
    assert "run the same command again to continue" in output
    check_checkpoints(tmp_path / "run")
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 1
    assert "resuming from" in finish(arguments, tmp_path / "run")
    whole, stopped = results(stories["lora-fp32"].whole), results(tmp_path / "run")
    for name in ("log.jsonl", "adapter/adapter_model.safetensors"):
        assert whole[name] == stopped[name], name
