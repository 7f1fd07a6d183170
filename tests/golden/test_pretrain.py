"""Losses of pretraining from scratch, pinned: what changes them changes fresh weights, a corpus's order, or an update.

The whole command, from config.json and a corpus, with every optimizer; and the ways a corpus can be laid out.
After a change that is meant to: ``python tests/golden/test_pretrain.py`` writes the file anew; say why in the change
log.
"""

from __future__ import annotations

import json
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from corpora import pretrain_words, write_blank_model, write_corpus
from oarsmith import cli
from tiny import read_lines

FILE = Path(__file__).with_name("pretrain.json")
KEYS: dict[str, Any] = {
    "max_length": 32,
    "per_device_train_batch_size": 2,
    "max_steps": 6,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 1,
    "weight_decay": 0.1,
    "logging_steps": 1,
    "split": "8,2",
    "eval_steps": 6,
    "max_evaluate_steps": 1,
    "save_strategy": "no",
    # One implementation of every operation, whatever the machine has.
    "kernels": "torch",
}
PROJECTED = {"projection_rank": 8, "projection_steps": 3}
VARIANTS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adamw_8bit": {"optim": "adamw_8bit"},
    "adamw_mini": {"optim": "adamw_mini"},
    "adafactor": {"optim": "adafactor"},
    "muon": {"optim": "muon"},
    "galore": {"optim": "galore", **PROJECTED},
    "apollo": {"optim": "apollo", **PROJECTED},
    "apollo_mini": {"optim": "apollo_mini", "projection_steps": 3},
    "documents apart": {"isolate_documents": True},
    "a blend": {"blend": True, "gradient_accumulation_steps": 2},
    "gpt2": {"family": "gpt2"},
    "z term and noise": {"z_loss": 1e-2, "neftune": True},
    "averaged": {"ema_decay": 0.5},
}
# Other CPUs sum in another order (1e-7), and 6 updates amplify it; a changed formula moves losses by 1e-3 and more.
TOLERANCE = 1e-4


def losses(folder: Path, variant: str) -> list[float]:
    """Of 6 updates, and of an evaluation behind them."""
    keys = KEYS | VARIANTS[variant]
    model = write_blank_model(folder / "model", keys.pop("family", "llama"))
    text, other = write_corpus(folder / "text"), write_corpus(folder / "other", documents=20, seed=1)
    corpus = f"0.6 {text} 0.4 {other}" if keys.pop("blend", False) else text
    assert cli.main(pretrain_words(model, corpus, folder / "run", **keys)) == 0
    records = read_lines(folder / "run" / "log.jsonl")
    return [record.get("loss", record.get("eval_loss")) for record in records]


@pytest.mark.parametrize("variant", VARIANTS)
def test_pinned(variant: str, tmp_path: Path, few_threads: None) -> None:
    expected = json.loads(FILE.read_text())[variant]
    assert len(expected) == 7
    assert losses(tmp_path, variant) == pytest.approx(expected, rel=TOLERANCE)


def test_what_is_pinned_tells_the_variants_apart() -> None:
    """No two end alike, and all of them learn. States in 8 bits are meant to be AdamW's within the tolerance."""
    pinned = json.loads(FILE.read_text())
    ends = sorted(values[-1] for name, values in pinned.items() if name != "adamw_8bit")
    assert all(low * (1 + 2 * TOLERANCE) < high for low, high in pairwise(ends)), ends
    assert all(values[5] < values[0] * (1 - 100 * TOLERANCE) for values in pinned.values())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as root:
        content = {name: losses(Path(root, name.replace(" ", "_")), name) for name in VARIANTS}
    FILE.write_text(json.dumps(content, indent=1) + "\n")
