"""``oarsmith sft`` with adapters that change no projections: trained, gone on with, served, merged or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

import oarsmith
from oarsmith import cli
from oarsmith.engine import Engine, Sampling
from tiny import assert_same_run, interrupted, read_lines, run_sft, write_rows, write_tiny_model

KEYS = {"max_length": 96, "per_device_train_batch_size": 2, "logging_steps": 1}
KEYS |= {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
IDS = torch.arange(7, 60)[None]
METHODS: dict[str, dict[str, Any]] = {
    "prefix": {"prefix_tuning": True, "num_prefix_tokens": 5, "prefix_dropout": 0.1, "recompute": True},
    "prefix projected": {"prefix_tuning": True, "num_prefix_tokens": 5, "prefix_projection": True},
    "prompt": {"adapter_type": "prompt_tuning", "num_prompt_tokens": 4, "prompt_tuning_init_text": "Be brief."},
    "prompt, neftune": {"adapter_type": "prompt_tuning", "num_prompt_tokens": 4, "neftune": True},
    "p-tuning": {"adapter_type": "p_tuning", "num_prompt_tokens": 4, "p_tuning_encoder": "lstm"},
    "reft": {"reft": True, "lora_rank": 3, "reft_position": "f2+l2", "reft_add_bias": True, "reft_dropout": 0.1},
    "tiny reft": {"reft": True, "intervention_type": "TinyIntervention", "reft_layers": "0,1", "recompute": True},
    "bitfit": {"adapter_type": "bitfit", "per_device_train_batch_size": 1},
    "tokens": {"adapter_type": "trainable_tokens", "trainable_tokens": "5,6,7,8,220"},
    "lora and tokens": {"lora": True, "trainable_tokens": "220", "bias": "all"},
    "prefix over 8 bits": {"prefix_tuning": True, "num_prefix_tokens": 5, "weight_quantize_algo": "a8w8linear"},
}
PEFT_READS = {"prefix", "prefix projected", "prompt", "prompt, neftune", "p-tuning", "tokens", "lora and tokens"}
MERGED = {"bitfit", "tokens", "lora and tokens"}
VIRTUAL = {"prompt": 4, "prompt, neftune": 4, "p-tuning": 4}


@pytest.fixture(autouse=True)
def _one_thread(few_threads: None) -> None:
    """Tiny matrices."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("virtual")
    write_tiny_model(place / "model", "qwen2")
    write_rows(place / "rows.jsonl")
    return place


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found = model.eval()(IDS)
    return found if isinstance(found, torch.Tensor) else found.logits


@pytest.mark.parametrize("name", METHODS)
def test_trained_and_gone_on_with(folder: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As if killed after step 2: the rest is bit for bit the same. PEFT computes what we do, and the engine too."""
    keys, run, again = KEYS | METHODS[name], tmp_path / "run", tmp_path / "again"
    assert run_sft(folder / "model", folder / "rows.jsonl", run, **keys) == 0
    interrupted(run, again, "checkpoint-4")
    assert run_sft(folder / "model", folder / "rows.jsonl", again, **keys) == 0
    assert_same_run(run, again)
    losses = [line["loss"] for line in read_lines(run / "log.jsonl") if "loss" in line]
    assert len(losses) == 4 and all(loss < 20 for loss in losses)
    ours = logits(oarsmith.load_model(run))
    assert (ours - logits(oarsmith.load_model(folder / "model"))).abs().max() > 1e-3, "it was trained"
    if name in PEFT_READS:
        base = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        theirs = logits(PeftModel.from_pretrained(base, run / "adapter"))[:, VIRTUAL.get(name, 0) :]
        assert (ours - theirs).abs().max() < 1e-4
    engine = Engine(folder / "model", adapter=run, device="cpu")
    answer = engine.generate([IDS[0].tolist()], Sampling(max_new_tokens=1, ignore_eos=True))[0].ids[0]
    best = ours[0, -1].topk(2)
    assert answer == int(best.indices[0]) or float(best.values[0] - best.values[1]) < 1e-2
    capsys.readouterr()
    code = cli.main(["merge-adapter", str(run), str(tmp_path / "merged")])
    if name in MERGED:
        assert code == 0
        assert (ours - logits(oarsmith.load_model(tmp_path / "merged"))).abs().max() < 1e-4
    else:
        assert code != 0 and "cannot be merged" in capsys.readouterr().err
    assert engine.how.startswith("compiled step" if name in MERGED else "PyTorch (")


def test_generate(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command answers with one, under the suite's name of its path too."""
    assert run_sft(folder / "model", folder / "rows.jsonl", tmp_path / "run", **KEYS | METHODS["prefix"]) == 0
    found = []
    for key in ("--adapter", "--prefix_path"):
        capsys.readouterr()
        words = ["generate", str(folder / "model"), key, str(tmp_path / "run"), "--prompt", "Hello"]
        assert cli.main([*words, "--max_new_tokens", "4", "--device", "cpu"]) == 0
        found.append(capsys.readouterr().out)
    assert found[0] == found[1] != ""
