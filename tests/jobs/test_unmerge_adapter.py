"""``oarsmith merge-adapter --unmerge``: the base again, as far as rounding left it, with or without the base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

import oarsmith
from oarsmith import cli
from tiny import run_sft, write_rows, write_tiny_model

IDS = torch.arange(5, 50)[None]
KEYS = {"max_length": 64, "max_steps": 5, "learning_rate": 3e-2, "lora": True, "lora_rank": 4}
TARGETS = {"projections": "all-linear", "ends": "embed_tokens,lm_head,q_proj"}


@pytest.fixture(autouse=True)
def _one_thread(few_threads: None) -> None:
    """Tiny matrices."""


def command(*words: object) -> int:
    return cli.main(["merge-adapter", *map(str, words)])


def logits(path: Path) -> Tensor:
    with torch.no_grad():
        return oarsmith.load_model(path, dtype="fp32")(IDS)


def made(folder: Path, kind: str, dtype: str, tied: bool) -> tuple[Path, Path, Path]:
    """Base, adapter and merged model."""
    write_tiny_model(folder / "wide", tie_word_embeddings=tied)
    model = oarsmith.load_model(folder / "wide", dtype=dtype)
    oarsmith.save_model(model, folder / "base", oarsmith.load_tokenizer(folder / "wide"))
    keys = {**KEYS, "lora_target_modules": TARGETS[kind]}
    assert run_sft(folder / "base", write_rows(folder / "rows.jsonl"), folder / "run", **keys) == 0
    assert command(folder / "run", folder / "merged") == 0
    return folder / "base", folder / "run" / "adapter", folder / "merged"


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_base_again(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, dtype: str, tied: bool) -> None:
    base, adapter, merged = made(tmp_path, kind, dtype, tied)
    effect = (logits(merged) - logits(base)).abs().max()
    assert effect > 0.05
    assert command(adapter, tmp_path / "again", "--unmerge", merged) == 0
    out = capsys.readouterr().out
    assert "beside the base: largest difference of a weight" in " ".join(out.split())
    proof = json.loads((tmp_path / "again" / "unmerge_proof.json").read_text())
    assert proof["base"]["max_weight_diff"] <= proof["max_rounding"] + 1e-6
    assert proof["mean_kl"] < 1e-3 < proof["effect_kl"] and proof["base"]["mean_kl"] < 1e-3
    assert proof["base"]["equal_weights"] > 0.5 if dtype == "bf16" else proof["max_rounding"] < 1e-6
    assert proof["same_hash"] in (True, False)
    assert (logits(tmp_path / "again") - logits(base)).abs().max() < (1e-4 if dtype == "fp32" else effect / 4)
    assert oarsmith.load_tokenizer(tmp_path / "again").chat_template is not None


def test_without_the_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter, merged = made(tmp_path, "projections", "fp32", False)
    expected = logits(base)
    shutil.move(base, tmp_path / "gone")
    assert command(adapter, tmp_path / "again", "--unmerge", merged) == 0
    assert "beside the base" not in capsys.readouterr().out
    assert json.loads((tmp_path / "again" / "unmerge_proof.json").read_text())["base"] is None
    assert (logits(tmp_path / "again") - expected).abs().max() < 1e-4
    # It is told where an adapter is taken off what it is not on.
    assert command(adapter, tmp_path / "twice", "--unmerge", tmp_path / "gone") == 2
    assert "it is the base itself" in capsys.readouterr().err
    assert command(adapter, tmp_path / "twice", "--unmerge", merged, "--requantize") == 2
    assert "nothing is quantized again" in capsys.readouterr().err
    assert command(adapter, tmp_path / "twice", "--unmerge", adapter, "--model_name_or_path", merged) == 2
    other = write_tiny_model(tmp_path / "other", seed=5)
    assert command(adapter, tmp_path / "twice", "--unmerge", merged, "--model_name_or_path", other) == 2
    assert "the restored model differs from the base" in capsys.readouterr().err
    assert not (tmp_path / "twice").exists()


def test_what_needs_its_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_model(tmp_path / "base")
    keys = {**KEYS, "use_dora": True}
    assert run_sft(tmp_path / "base", write_rows(tmp_path / "rows.jsonl"), tmp_path / "run", **keys) == 0
    assert command(tmp_path / "run", tmp_path / "merged") == 0
    assert command(tmp_path / "run", tmp_path / "again", "--unmerge", tmp_path / "merged") == 2
    assert "does more than to add to weights: taking it off needs the base" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


def test_in_fewer_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, adapter, merged = made(tmp_path, "projections", "fp32", False)
    config = merged / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": {"quant_method": "gptq"}}))
    assert command(adapter, tmp_path / "again", "--unmerge", merged) == 2
    assert "do not tell what they were" in capsys.readouterr().err
