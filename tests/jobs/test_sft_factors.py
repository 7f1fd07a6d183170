"""``oarsmith sft`` with adapters of other factors than LoRA's: trained, gone on with, read by PEFT, merged."""

from __future__ import annotations

import json
from collections.abc import Callable
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

KEYS = {"max_length": 64, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1}
KEYS |= {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
IDS = torch.arange(7, 60)[None]
# PEFT has them all but MoRA and bottlenecks.
METHODS: dict[str, dict[str, Any]] = {
    "mora": {"lora": True, "use_mora": True, "lora_rank": 4},
    "vera": {"vera": True, "vera_rank": 4},
    "lokr": {"lokr": True, "lokr_dim": 2, "lora_dropout": 0.1},
    "loha": {"adapter_type": "loha", "lora_rank": 2},
    "ia3": {"adapter_type": "ia3"},
    "fourierft": {"adapter_type": "fourierft", "fourierft_frequencies": 50},
    "oft, constrained": {"adapter_type": "oft", "oft_constrained": True, "oft_eps": 0.01},
    "boft over 8 bits": {"adapter_type": "boft", "weight_quantize_algo": "a8w8linear"},
    "bottleneck": {"adapter_type": "bottleneck", "lora_rank": 4},
}


@pytest.fixture(autouse=True)
def _one_thread(few_threads: None) -> None:
    """Tiny matrices."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("factors")
    write_tiny_model(place / "llama")
    write_rows(place / "rows.jsonl")
    return place


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found = model.eval()(IDS)
    return found if isinstance(found, Tensor) else found.logits


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.filterwarnings("ignore:Specified to not", "ignore:Failed to load the CUDA extension")
@pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor")
def test_trained_and_gone_on_with(
    folder: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if killed after step 1: the rest is bit for bit the same."""
    keys, run, again = KEYS | METHODS[name], tmp_path / "run", tmp_path / "again"
    assert run_sft(folder / "llama", folder / "rows.jsonl", run, **keys) == 0
    interrupted(run, again, "checkpoint-2")
    assert run_sft(folder / "llama", folder / "rows.jsonl", again, **keys) == 0
    assert_same_run(run, again)
    assert read_lines(run / "log.jsonl")[0]["loss"] > 0
    ours = logits(oarsmith.load_model(run))
    assert (ours - logits(oarsmith.load_model(folder / "llama"))).abs().max() > 1e-4, "it was trained"
    if not name.startswith(("mora", "bottleneck")):
        monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)
        base = transformers.AutoModelForCausalLM.from_pretrained(folder / "llama", dtype=torch.float32)
        assert (ours - logits(PeftModel.from_pretrained(base, run / "adapter"))).abs().max() < 1e-4
    merges = cli.main(["merge-adapter", str(run), str(tmp_path / "merged")])
    if name.startswith("bottleneck"):
        assert merges == 2 and "has a nonlinearity and cannot be merged" in capsys.readouterr().err
        return
    assert merges == 0
    assert (ours - logits(oarsmith.load_model(tmp_path / "merged"))).abs().max() < 1e-4


def test_what_a_run_says_of_itself(folder: Path, tmp_path: Path) -> None:
    """Derived keys are those that the method has, and a saved run can be run again."""
    derived: dict[str, Callable[[dict[str, Any]], bool]] = {
        "vera": lambda run: run["lora_alpha"] is None and run["lora_target_modules"] == "all-linear",
        "lokr": lambda run: run["lora_alpha"] == 2.0 and run["lora_rank"] == 2,
        "ia3": lambda run: run["lora_alpha"] is None and run["lora_target_modules"] is None,
    }
    for name, holds in derived.items():
        keys = KEYS | METHODS[name] | {"max_steps": 1, "save_strategy": "no"}
        assert run_sft(folder / "llama", folder / "rows.jsonl", tmp_path / name, **keys) == 0
        saved = json.loads((tmp_path / name / "run.json").read_text())
        assert saved["adapter_type"] == name and holds(saved), saved
    again = tmp_path / "again"
    assert cli.main(["sft", str(tmp_path / "lokr" / "run.json"), "--output_dir", str(again)]) == 0
    first, second = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (tmp_path / "lokr", again))
    assert first and all(torch.equal(first[key], second[key]) for key in first)


def test_a_size_that_does_not_fit(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = KEYS | {"adapter_type": "boft", "boft_block_size": 5}
    assert run_sft(folder / "llama", folder / "rows.jsonl", tmp_path / "run", **keys) == 2
    error = capsys.readouterr().err
    assert "boft_block_size" in error and "blocks of 5 do not divide" in error
