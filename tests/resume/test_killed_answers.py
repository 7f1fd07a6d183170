"""``oarsmith generate`` on a file, killed again and again: at the end each row has its answer, once, in its place."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import pytest

from resume.killing import Run
from tiny import write_tiny_model

KILLS = 6
ROWS = 240


def num_answers(output: Path) -> int:
    partial = output.with_name(f"{output.name}.partial") / "answers.jsonl"
    return partial.read_bytes().count(b"\n") if partial.exists() else 0


@pytest.mark.slow
def test_killed_again_and_again(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model")
    rows = [{"prompt": f"Say {n}." + " Slowly." * (n % 5), "sampling": {"max_tokens": 3 + n % 17}} for n in range(ROWS)]
    (tmp_path / "in.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    def words(output: Path) -> list[str]:
        keys = {"input_file": tmp_path / "in.jsonl", "output_file": output, "num_threads": 1, "temperature": 1.5}
        return ["generate", str(model), *(f"--{key}={value}" for key, value in keys.items())]

    whole, killed, printed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl", tmp_path / "printed.txt"
    run = Run(words(whole), printed)
    assert run.end() == 0, run.output()
    chance = random.Random(0)
    for _ in range(KILLS):
        run, wanted = Run(words(killed), printed), num_answers(killed) + chance.randint(1, 30)
        run.wait_until(lambda wanted=wanted: num_answers(killed) >= wanted)
        time.sleep(chance.uniform(0, 0.01))
        assert run.end(signal.SIGKILL) == -signal.SIGKILL, run.output()
        assert not killed.exists()
    run = Run(words(killed), printed)
    assert run.end() == 0, run.output()
    assert "going on behind row" in run.output()
    assert killed.read_bytes() == whole.read_bytes()
    assert [json.loads(line)["prompt"] for line in killed.read_text().splitlines()] == [row["prompt"] for row in rows]
