"""``oarsmith sft --lora --weight_quantize_algo a8w8linear``: what the key changes in a run, and what it must not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from torch import Tensor

import oarsmith
from oarsmith import cli
from tiny import read_lines, run_sft, write_rows, write_tiny_model

KEYS = {
    "max_length": 64,
    "per_device_train_batch_size": 2,
    "max_steps": 6,
    "logging_steps": 1,
    "save_steps": 2,
    "learning_rate": 1e-2,
    "lora": True,
    "lora_rank": 4,
}
INT8 = KEYS | {"weight_quantize_algo": "a8w8linear"}
IDS = torch.arange(7, 60)[None]


@pytest.fixture(autouse=True)
def _one_thread(few_threads: None) -> None:
    """Tiny matrices."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, rows, and a run over them with 8-bit weights under LoRA."""
    place = tmp_path_factory.mktemp("sft_int8")
    write_tiny_model(place / "llama", "llama")
    write_rows(place / "rows.jsonl")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    assert run_sft(place / "llama", place / "rows.jsonl", place / "run", **INT8) == 0
    torch.set_num_threads(before)
    return place


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_lines(run / "log.jsonl") if "loss" in line]


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        found = model.eval()(IDS)
    return found if isinstance(found, Tensor) else found.logits


def near_but_other(found: list[float], expected: list[float]) -> bool:
    """Rounding moves every loss, and none far: rows of 32 and 48 numbers have errors of some percent."""
    pairs = list(zip(found, expected, strict=True))
    return len(pairs) == 6 and all(a != b and abs(a - b) < 0.02 * b for a, b in pairs)


def test_the_key_is_honoured(folder: Path, tmp_path: Path) -> None:
    assert run_sft(folder / "llama", folder / "rows.jsonl", tmp_path / "plain", **KEYS) == 0
    assert near_but_other(losses(folder / "run"), losses(tmp_path / "plain"))
    assert losses(folder / "run")[-1] < losses(folder / "run")[0], "it learns"


@pytest.mark.parametrize("changes", [{"kernels": "torch"}, {"dtype": "bf16"}, {"recompute": True}])
def test_with_other_settings(folder: Path, tmp_path: Path, changes: dict[str, object]) -> None:
    plain, small = ({**keys, **changes} for keys in (KEYS, INT8))
    for name, keys in (("plain", plain), ("small", small)):
        assert run_sft(folder / "llama", folder / "rows.jsonl", tmp_path / name, **keys) == 0
    assert near_but_other(losses(tmp_path / "small"), losses(tmp_path / "plain"))
    if "recompute" in changes:
        assert losses(tmp_path / "small") == losses(folder / "run"), "the same numbers, bit for bit"


def test_the_adapter_belongs_to_the_checkpoint_s_own_weights(folder: Path) -> None:
    """PEFT reads it on the fp32 base, and so do we: nothing of the run's 8 bits is left."""
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "llama", dtype=torch.float32)
    theirs = logits(PeftModel.from_pretrained(base, folder / "run" / "adapter"))
    assert (logits(oarsmith.load_model(folder / "run")) - theirs).abs().max() < 1e-4


def test_merging_takes_the_checkpoint_s_own_weights(folder: Path, tmp_path: Path) -> None:
    assert cli.main(["merge-adapter", str(folder / "run"), str(tmp_path / "merged")]) == 0
    merged, adapted = oarsmith.load_model(tmp_path / "merged"), oarsmith.load_model(folder / "run")
    assert (logits(merged) - logits(adapted)).abs().max() < 1e-4
    assert all(parameter.is_floating_point() for parameter in merged.parameters())


def test_a_resumed_run_is_the_uninterrupted_one(folder: Path, tmp_path: Path) -> None:
    """As if killed after step 2: weights are rounded anew from the checkpoint, to the same 8 bits."""
    shutil.copytree(folder / "run", tmp_path / "run")
    for name in ("checkpoint-4", "checkpoint-6", "adapter"):
        shutil.rmtree(tmp_path / "run" / name)
    assert run_sft(folder / "llama", folder / "rows.jsonl", tmp_path / "run", **INT8) == 0
    for name in ("log.jsonl", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (folder / "run" / name).read_bytes(), name
    small = {path.name for path in (tmp_path / "run" / "checkpoint-6").iterdir()}
    assert "adapter_model.safetensors" in small and "model.safetensors" not in small
