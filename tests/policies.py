"""Runs of ``oarsmith grpo`` on tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from oarsmith import cli
from tiny import write_tiny_model

REWARD = '''
def reward(prompt, completion, **row):
    """Letters of an answer that are vowels, and a number of the row."""
    return sum(letter in "aeiou" for letter in completion) / 10 + row["bonus"]
'''
KEYS: dict[str, Any] = {
    "num_threads": 1,
    "dtype": "fp32",
    "prompts_per_step": 3,
    "samples_per_prompt": 4,
    "max_new_tokens": 8,
    "learning_rate": 1e-3,
    "max_steps": 4,
    "save_steps": 1,
    "seed": 5,
}


def write_inputs(folder: Path, family: str = "llama") -> tuple[Path, Path, str]:
    """A model, prompts and a reward."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"src": f"What is {n} plus {n + 1}?", "tgt": str(2 * n + 1), "bonus": n / 100} for n in range(7)]
    data = folder / "prompts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "reward.py").write_text(REWARD, encoding="utf-8")
    return write_tiny_model(folder / "model", family), data, f"{folder / 'reward.py'}:reward"


def grpo(inputs: tuple[Path, Path, str], output_dir: Path, **changes: Any) -> int:
    """The command in this process; its exit status."""
    model, data, reward = inputs
    keys = {**KEYS, "rewards": reward, "output_dir": output_dir, **changes}
    return cli.main(["grpo", str(model), str(data), *(f"--{key}={value}" for key, value in keys.items())])
