"""A peer of `benchmarks/sft.py`: LLaMA-Factory, one process a measurement. It writes one line a step.

LLaMA-Factory holds transformers and TRL back to older versions, so it lives in an environment of its own:

    python -m venv lf && lf/bin/pip install llamafactory && lf/bin/pip uninstall -y torchvision torchaudio

(torchvision and torchaudio as pip chooses them may not fit a CPU build of torch, and LLaMA-Factory then dies on import.
It imports torchaudio without need for text, so an empty module takes its place below.) Settings are those of its own
examples, as far as they run on a CPU: padded batches of 8, bf16 autocast, gradient checkpointing off, which is faster.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import json
import sys
import time
import types
from pathlib import Path
from typing import Any

if importlib.util.find_spec("torchaudio") is None:
    sys.modules["torchaudio"] = types.ModuleType("torchaudio")
    sys.modules["torchaudio"].__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)

import torch
from llamafactory.train.tuner import run_exp
from transformers import TrainerCallback


class Recorder(TrainerCallback):
    """Counts what really enters the model, and notes each step with the seconds since the one before."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tokens = 0
        self._seconds = 0.0
        self._last = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        rows = parts["train_dataloader"].dataset
        print(f"tokens in the data set: {sum(map(len, rows['input_ids']))}", flush=True)
        parts["model"].register_forward_pre_hook(self._count, with_kwargs=True)
        self._last = time.perf_counter()

    def _count(self, module: torch.nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._tokens += int(named["attention_mask"].bool().sum())

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = time.perf_counter()
        self._seconds, self._last = now - self._last, now

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        loss = float(logs["loss"])
        record = {"step": state.global_step, "seconds": self._seconds, "tokens": self._tokens, "loss": loss}
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self._tokens = 0


def arguments(options: argparse.Namespace, data: Path) -> dict[str, Any]:
    """What would be in its YAML file."""
    content = {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": options.model,
        "template": options.template,
        "dataset_dir": str(data),
        "dataset": "pairs",
        "cutoff_len": options.max_length,
        "overwrite_cache": True,
        "preprocessing_num_workers": None,
        "finetuning_type": options.mode,
        "output_dir": options.output_dir,
        "max_steps": options.num_steps,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "constant",
        "bf16": True,
        "use_cpu": True,
        "disable_gradient_checkpointing": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "seed": options.seed,
    }
    if options.mode == "lora":
        content |= {"lora_rank": 16, "lora_alpha": 32, "lora_target": "all"}
    return content


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "rows", "mode", "setting", "template", "output_dir", "record"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("num_steps", "max_length", "rows_per_step", "threads", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--learning_rate", type=float, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = Path(options.output_dir).with_name("llamafactory-data")
    data.mkdir(parents=True)
    pairs = [json.loads(line) for line in (Path(options.rows) / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [{"instruction": pair["src"], "input": "", "output": pair["tgt"]} for pair in pairs]
    (data / "pairs.json").write_text(json.dumps(rows), encoding="utf-8")
    (data / "dataset_info.json").write_text(json.dumps({"pairs": {"file_name": "pairs.json"}}))
    run_exp(arguments(options, data), callbacks=[Recorder(Path(options.record))])


if __name__ == "__main__":
    main()
