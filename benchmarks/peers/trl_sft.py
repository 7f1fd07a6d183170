"""The peer of `benchmarks/sft.py`: TRL's SFTTrainer, one process a measurement. It writes one line a step.

`packed` is the fastest stock setting found on CPUs: packing with batch 1 and accumulation (a larger packed batch makes
one dense attention mask over all of it), no gradient checkpointing. `default` is what TRL does when nothing is said:
padded, with gradient checkpointing. Weights are bf16 in both, without autocast on top, which only adds casts. `master`
is `packed` with fp32 weights under bf16 autocast: the update rule that Oarsmith has.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer
from trl_settings import same_settings


class Recorder(TrainerCallback):
    """Counts what really enters the model, and notes each step with the seconds since the one before."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last = time.perf_counter()
        self._tokens = self._trained = 0
        self._losses: list[float] = []

    def count(self, inputs: dict[str, torch.Tensor], loss: torch.Tensor) -> None:
        mask, ids = inputs.get("attention_mask"), inputs["input_ids"]
        # A packed batch has no mask and no padding.
        self._tokens += ids.numel() if mask is None else int(mask.sum())
        self._trained += int((inputs["labels"] != -100).sum())
        self._losses.append(float(loss))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = time.perf_counter()
        record = {
            "step": state.global_step,
            "seconds": now - self._last,
            "tokens": self._tokens,
            "trained": self._trained,
            "loss": sum(self._losses),
        }
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self._last, self._tokens, self._trained, self._losses = now, 0, 0, []


class CountingTrainer(SFTTrainer):
    """The stock trainer, with every micro-batch shown to the recorder."""

    recorder: Recorder

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        seen = {name: inputs[name] for name in ("input_ids", "attention_mask", "labels") if name in inputs}
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.recorder.count(seen, loss.detach())
        return loss


def settings(options: argparse.Namespace) -> SFTConfig:
    """The settings under test."""
    packed = options.setting in ("packed", "master")
    kind = {
        "packing": packed,
        "per_device_train_batch_size": 1 if packed else 8,
        "gradient_accumulation_steps": options.rows_per_step if packed else 1,
    }
    if packed:
        kind["gradient_checkpointing"] = False
    return SFTConfig(
        **same_settings(options),
        completion_only_loss=True,
        **kind,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "rows", "mode", "setting", "output_dir", "record"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("num_steps", "max_length", "rows_per_step", "threads", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--learning_rate", type=float, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [
        json.loads(line) for line in (Path(options.rows) / "rendered.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    dtype = torch.float32 if options.setting == "master" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype, attn_implementation="sdpa")
    model.config.use_cache = False
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    recorder = Recorder(Path(options.record))
    trainer = CountingTrainer(
        model=model,
        args=settings(options),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(options.model),
        peft_config=lora if options.mode == "lora" else None,
        callbacks=[recorder],
    )
    trainer.recorder = recorder
    print(f"tokens in the data set: {sum(map(len, trainer.train_dataset['input_ids']))}", flush=True)
    trainer.train()


if __name__ == "__main__":
    main()
