"""Whole runs from the command line on several processes: the log of one process, layouts changed on the way, kills."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tiny import SRC, read_lines, write_rows, write_tiny_model

KEYS: dict[str, Any] = {
    "max_length": 48,
    "per_device_train_batch_size": 1,
    "max_steps": 6,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_steps": 2,
    "evaluation_strategy": "steps",
    "eval_steps": 3,
    "eval_split_ratio": 0.2,
    "dtype": "fp32",
    "kernels": "torch",
    "seed": 3,
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_tiny_model(folder / "model", "qwen2")
    write_rows(folder / "rows.jsonl", 40)
    return folder


def start(inputs: Path, output_dir: Path, count: int, **changes: Any) -> subprocess.Popen[str]:
    keys = (
        KEYS | {"output_dir": output_dir, "gradient_accumulation_steps": 4 // count, "nproc_per_node": count} | changes
    )
    words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        [sys.executable, "-m", "oarsmith", "sft", inputs / "model", inputs / "rows.jsonl", *words],
        env=environment | {"PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(inputs: Path, output_dir: Path, count: int, **changes: Any) -> str:
    process = start(inputs, output_dir, count, **changes)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed[-4000:]
    return printed


@pytest.fixture(scope="module")
def alone(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    finish(inputs, folder, 1)
    return folder


def same(run: Path, expected: Path) -> None:
    """The same log of steps and weights, but for the order of fp32 sums. Runs that ended early evaluated then."""
    found, wanted = ([line for line in read_lines(path / "log.jsonl") if "loss" in line] for path in (run, expected))
    assert [line["step"] for line in found] == [line["step"] for line in wanted]
    for line, other in zip(found, wanted, strict=True):
        assert line.keys() == other.keys()
        assert line == pytest.approx(other, rel=2e-4)
    weights, others = (load_file(path / "model" / "model.safetensors") for path in (run, expected))
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        # A gradient near zero may move its weight by the learning rate either way in each of the steps.
        torch.testing.assert_close(tensor, others[name], rtol=0, atol=2e-3)


def test_layouts_changed_on_the_way(inputs: Path, alone: Path, tmp_path: Path) -> None:
    """Begun sharded over two, gone on with as two copies, ended by one process."""
    run = tmp_path / "run"
    printed = finish(inputs, run, 2, sharding="stage3", max_steps=2, save_steps=2)
    assert "processes: 2, sharded over 2" in printed and printed.count("model: ") == 2
    for step, count, keys in ((4, 2, {}), (6, 1, {})):
        checkpoint = run / f"checkpoint-{step - 2}"
        finish(inputs, run, count, max_steps=step, resume_from_checkpoint=str(checkpoint), **keys)
    same(run, alone)
    begun = json.loads((run / "checkpoint-2" / "trainer" / "state.json").read_text())
    assert begun["batches_per_step"] == 4


def test_a_step_keeps_its_size(inputs: Path, tmp_path: Path) -> None:
    finish(inputs, tmp_path / "run", 1, max_steps=2)
    process = start(inputs, tmp_path / "run", 1, max_steps=2, gradient_accumulation_steps=2)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 2 and "a step had 4 batches, now it has 2" in printed


@pytest.mark.slow
def test_ranks_killed_at_random(inputs: Path, tmp_path: Path) -> None:
    """20 times a rank is killed at a random moment, in start-up or in a step; all start again and go on from the last
    complete checkpoint, and the run ends as if nothing had been."""
    steps = {"max_steps": 60, "save_steps": 1, "save_total_limit": 2, "evaluation_strategy": "no"}
    finish(inputs, tmp_path / "whole", 2, sharding="stage2", **steps)
    run, dice, killed = tmp_path / "run", random.Random(7), 0
    process = start(inputs, run, 2, sharding="stage2", max_restarts=40, **steps)
    while process.poll() is None and killed < 20:
        time.sleep(dice.uniform(1.0, 9.0))
        ranks = workers(process.pid)
        if ranks and process.poll() is None:
            os.kill(dice.choice(ranks), signal.SIGKILL)
            killed += 1
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed[-4000:]
    assert killed == 20, f"the run was over after {killed}"
    same(run, tmp_path / "whole")


def workers(agent: int) -> list[int]:
    """Processes that an agent has started."""
    found = Path(f"/proc/{agent}/task/{agent}/children")
    return [int(pid) for pid in found.read_text().split()] if found.exists() else []


def test_what_fails_is_said_once(inputs: Path, tmp_path: Path) -> None:
    """By the main process, and the agent says which one ended; no traceback."""
    (tmp_path / "model").symlink_to(inputs / "model")
    (tmp_path / "rows.jsonl").write_text('{"src": "a", "tgt": 3}\n')
    process = start(tmp_path, tmp_path / "run", 2)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert printed.count("rows.jsonl:1") == 1, printed
    assert "process 0 of the run ended with status 2" in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_asked_to_end(inputs: Path, tmp_path: Path, number: signal.Signals, status: int) -> None:
    """The agent ends its processes and itself, in one line; SIGTERM lets them save first."""
    run = tmp_path / "run"
    process = start(inputs, run, 2, max_steps=5000, save_steps=1000)
    log = run / "log.jsonl"
    while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) > 2):
        time.sleep(0.1)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == status, printed[-3000:]
    assert "this is a bug" not in printed and "Traceback" not in printed, printed[-3000:]
    assert bool(list(run.glob("checkpoint-*/manifest.json"))) == (number == signal.SIGTERM)
