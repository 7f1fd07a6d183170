"""``oarsmith merge-adapter --requantize``: the layout of the quantized base, and how much of the adapter is left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import oarsmith
from oarsmith import cli
from oarsmith.checkpoint.source import open_model
from packed_weights import FORMATS, quantize_directory
from tiny import run_sft, write_rows, write_tiny_model

IDS = torch.arange(5, 50)[None]
KEYS = {"max_length": 64, "max_steps": 6, "learning_rate": 3e-2, "lora": True, "lora_rank": 4}


@pytest.fixture(autouse=True)
def _one_thread(few_threads: None) -> None:
    """Tiny matrices."""


def merge(*words: object) -> int:
    return cli.main(["merge-adapter", *map(str, words)])


def logits(path: Path) -> Tensor:
    with torch.no_grad():
        return oarsmith.load_model(path, dtype="fp32")(IDS).log_softmax(-1)


def trained(folder: Path, kind: str) -> tuple[Path, Path]:
    """A quantized base, plain but for the projections, and a run over it."""
    base = write_tiny_model(folder / "base")
    quantize_directory(base, kind, lambda name: "proj" in name)
    assert run_sft(base, write_rows(folder / "rows.jsonl"), folder / "run", **KEYS) == 0
    return base, folder / "run"


@pytest.mark.parametrize("kind", FORMATS)
def test_the_layout_of_the_base(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, run = trained(tmp_path, kind)
    assert merge(run, tmp_path / "merged", "--requantize", "--kl_budget", "1") == 0
    assert "KL(adapter || merged)" in capsys.readouterr().out
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config == json.loads((base / "config.json").read_text()) and "quantization_config" in config
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    assert {n: (t.dtype, t.shape) for n, t in before.items()} == {n: (t.dtype, t.shape) for n, t in after.items()}
    changed = {n for n in before if not torch.equal(before[n].view(torch.uint8), after[n].view(torch.uint8))}
    assert len(changed) == 14 and all(name.endswith(("qweight", "weight_packed", "_proj.weight")) for name in changed)
    # Most of what the adapter does is there, and what is told is what is written.
    adapted, merged, plain = logits(run), logits(tmp_path / "merged"), logits(base)
    left = (adapted.exp() * (adapted - merged)).sum(-1).mean()
    assert left < 0.5 * (adapted.exp() * (adapted - plain)).sum(-1).mean()
    proof = json.loads((tmp_path / "merged" / "merge_proof.json").read_text())
    assert 0 < proof["mean_kl"] < 0.5 * proof["effect_kl"]


def test_nothing_to_change(tmp_path: Path) -> None:
    """An adapter next to zero leaves every byte where it was."""
    base = write_tiny_model(tmp_path / "base")
    quantize_directory(base, "gptq", lambda name: "proj" in name)
    keys = KEYS | {"max_steps": 1, "learning_rate": 1e-12}
    assert run_sft(base, write_rows(tmp_path / "rows.jsonl"), tmp_path / "run", **keys) == 0
    assert merge(tmp_path / "run", tmp_path / "merged", "--requantize") == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert open_model(base)[1].shapes == open_model(tmp_path / "merged")[1].shapes


def test_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """More is lost than the budget allows; and a base with nothing to write."""
    base, run = trained(tmp_path, "gptq")
    assert merge(run, tmp_path / "merged", "--requantize", "--kl_budget", "1e-9") != 0
    err = " ".join(capsys.readouterr().err.split())
    assert "nothing was written" in err and "merge without requantize" in err and "the adapter itself moves it" in err
    plain = write_tiny_model(tmp_path / "plain")
    assert merge(run, tmp_path / "merged", "--requantize", "--any_base", "--model_name_or_path", plain) != 0
    assert "there are no quantized weights" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists() and base.exists()
