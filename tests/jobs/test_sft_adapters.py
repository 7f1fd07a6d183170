"""``oarsmith sft`` with every kind of adapter: trained, gone on with, read by PEFT, merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

import oarsmith
from oarsmith import cli
from tiny import assert_same_run, interrupted, read_lines, run_sft, write_rows, write_tiny_model

KEYS = {"max_length": 64, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "lora_rank": 4, "logging_steps": 1}
KEYS |= {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
IDS = torch.arange(7, 60)[None]
ADALORA = {"adapter_type": "adalora", "adalora_tinit": 0, "adalora_tfinal": 1, "adalora_init_rank": 6}
METHODS: dict[str, dict[str, Any]] = {
    "rslora+": {"lora": True, "rslora_plus": True},
    "gaussian": {"lora": True, "init_lora_weights": "gaussian"},
    "dora": {"lora": True, "use_dora": True, "lora_dropout": 0.1},
    "pissa": {"lora": True, "pissa": True},
    "pissa by iteration": {"lora": True, "init_lora_weights": "pissa_niter_8"},
    "olora": {"lora": True, "init_lora_weights": "olora"},
    "loraga": {"lora": True, "loraga": True, "loraga_batches": 3},
    "lorapro": {"lora": True, "lorapro": True},
    "moslora": {"lora": True, "lora_use_mixer": True},
    "ends": {"lora": True, "lora_target_modules": "embed_tokens,lm_head,q_proj", "lora_dropout": 0.1, "z_loss": 0.01},
    "ends, recomputed, over 4 bits": {
        "lora": True,
        "lora_target_modules": "embed_tokens,lm_head,q_proj",
        "rslora": True,
        "recompute": True,
        "packing": True,
        "weight_quantize_algo": "nf4",
    },
    "loraga on the head": {"lora": True, "loraga": True, "loraga_batches": 3, "lora_target_modules": "lm_head,v_proj"},
    "adalora": ADALORA,
    "adalora over 8 bits": {**ADALORA, "weight_quantize_algo": "a8w8linear", "gradient_accumulation_steps": 2},
}


@pytest.fixture(autouse=True)
def _one_thread(few_threads: None) -> None:
    """Tiny matrices."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("adapters")
    write_tiny_model(place / "llama")
    write_rows(place / "rows.jsonl")
    return place


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found = model.eval()(IDS)
    return found if isinstance(found, Tensor) else found.logits


@pytest.mark.parametrize("name", METHODS)
def test_trained_and_gone_on_with(folder: Path, tmp_path: Path, name: str) -> None:
    """As if killed after step 2: the rest is bit for bit the same; and PEFT computes what we do."""
    keys, run, again = KEYS | METHODS[name], tmp_path / "run", tmp_path / "again"
    assert run_sft(folder / "llama", folder / "rows.jsonl", run, **keys) == 0
    interrupted(run, again, "checkpoint-4")
    assert run_sft(folder / "llama", folder / "rows.jsonl", again, **keys) == 0
    assert_same_run(run, again)
    ours = logits(oarsmith.load_model(run))
    assert (ours - logits(oarsmith.load_model(folder / "llama"))).abs().max() > 1e-3, "it was trained"
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "llama", dtype=torch.float32)
    assert (ours - logits(PeftModel.from_pretrained(base, run / "adapter"))).abs().max() < 1e-4
    assert cli.main(["merge-adapter", str(run), str(tmp_path / "merged")]) == 0
    assert (ours - logits(oarsmith.load_model(tmp_path / "merged"))).abs().max() < 1e-4


def test_the_ranks_of_adalora(folder: Path, tmp_path: Path) -> None:
    keys = KEYS | ADALORA
    assert run_sft(folder / "llama", folder / "rows.jsonl", tmp_path / "run", **keys) == 0
    stored = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    values = [tensor for key, tensor in stored.items() if key.endswith("lora_E")]
    assert (len(values), sum(int((tensor != 0).sum()) for tensor in values)) == (14, 14 * 4)
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (config["total_step"], config["tfinal"], config["init_r"], config["target_r"]) == (4, 1, 6, 4)
    assert all("orthogonality" in line for line in read_lines(tmp_path / "run" / "log.jsonl") if "loss" in line)


def test_lora_plus_learns_faster_in_b(folder: Path, tmp_path: Path) -> None:
    """One step of Adam moves every weight by its learning rate."""
    moved = []
    for number, (scale, in_backward) in enumerate([(1, False), (16, False), (16, True)]):
        keys = KEYS | {"lora": True, "lora_plus_scale": scale, "optimizer_in_backward": in_backward}
        run = tmp_path / str(number)
        assert run_sft(folder / "llama", folder / "rows.jsonl", run, **keys | {"max_steps": 1, "max_grad_norm": 0}) == 0
        stored = load_file(run / "adapter" / "adapter_model.safetensors")
        moved.append(max(float(tensor.abs().max()) for key, tensor in stored.items() if "lora_B" in key))
    assert moved[1:] == pytest.approx([16 * moved[0]] * 2, rel=1e-4)


def test_loraga_looks_at_the_data(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its start is not that of LoRA, and the first step is on the first batch all the same."""
    keys = KEYS | {"lora": True, "max_steps": 1}
    assert run_sft(folder / "llama", folder / "rows.jsonl", tmp_path / "lora", **keys) == 0
    assert run_sft(folder / "llama", folder / "rows.jsonl", tmp_path / "ga", **keys, loraga=True) == 0
    assert "estimating gradients on the first 8 batches" in capsys.readouterr().out
    first = [read_lines(tmp_path / name / "log.jsonl")[0] for name in ("lora", "ga")]
    assert first[0]["loss"] == pytest.approx(first[1]["loss"], rel=1e-6)
    stored = load_file(tmp_path / "ga" / "adapter" / "adapter_model.safetensors")
    b = stored["base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"]
    # 32^(1/4) / 4 times unit vectors.
    assert b[:, 4:].norm(dim=0).tolist() == pytest.approx([32**0.25 / 4] * 4, rel=1e-4)


def test_too_short_for_adalora(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = KEYS | {"adapter_type": "adalora", "adalora_tinit": 3, "adalora_tfinal": 3}
    assert run_sft(folder / "llama", folder / "rows.jsonl", tmp_path / "run", **keys) == 2
    assert "no step is between them" in capsys.readouterr().err
