"""The peer of `benchmarks/dpo.py`: TRL's DPOTrainer on given ids in the given order. It writes one line a step.

`default` is what TRL does when nothing is said: the reference is computed in every step (LoRA: with the adapter
switched off; all weights: by a second model), with gradient checkpointing. `plain` is the same without checkpointing.
`precomputed` is `plain` with `precompute_ref_log_probs`. `best` is `precomputed` with the pairs of a step one after the
other (batch 1 with accumulation), which pads least: the fastest stock setting found on CPUs; `padding_free` would pad
nothing, but TRL 1.16 warns that it is unavailable and pads. Weights are bf16 in all of these, without autocast on top,
which only adds casts. `master` is `best` with fp32 weights under bf16 autocast: the update rule that Oarsmith has.
`exact` is `plain` in fp32, to compare numbers with.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer
from trl_settings import same_settings

ONE_BY_ONE = ("best", "master")
PRECOMPUTED = ("precomputed", *ONE_BY_ONE)


class Recorder(TrainerCallback):
    """Notes each step: the seconds since the one before, real tokens, loss, log-probabilities."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tokens = 0
        self._losses: list[float] = []
        self._seconds = 0.0
        self.reference_s = 0.0
        self.last = time.perf_counter()

    def count(self, inputs: dict[str, torch.Tensor], loss: torch.Tensor) -> None:
        self._tokens += int(inputs["attention_mask"].sum())
        self._losses.append(float(loss))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = time.perf_counter()
        self._seconds, self.last = now - self.last, now

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        record = {
            "step": state.global_step,
            "seconds": self._seconds,
            "tokens": self._tokens,
            "loss": sum(self._losses),
            "logps_chosen": logs["logps/chosen"],
            "logps_rejected": logs["logps/rejected"],
            "reference_s": self.reference_s,
        }
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self._tokens, self._losses = 0, []


class MeasuredTrainer(DPOTrainer):
    """The stock trainer on ids, with every micro-batch shown to the recorder and the reference's pass timed."""

    recorder: Recorder

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, *args: Any) -> Any:
        begin = time.perf_counter()
        found = super()._precompute_ref_logps(*args)
        self.recorder.reference_s = time.perf_counter() - begin
        return found

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        seen = {"attention_mask": inputs["attention_mask"]}
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.recorder.count(seen, loss.detach())
        return loss


def settings(options: argparse.Namespace) -> DPOConfig:
    """The settings under test."""
    one_by_one = options.setting in ONE_BY_ONE
    kind = {} if options.setting == "default" else {"gradient_checkpointing": False}
    return DPOConfig(
        **same_settings(options),
        beta=options.beta,
        per_device_train_batch_size=1 if one_by_one else options.pairs_per_step,
        gradient_accumulation_steps=options.pairs_per_step if one_by_one else 1,
        precompute_ref_log_probs=options.setting in PRECOMPUTED,
        train_sampling_strategy="sequential",
        **kind,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "rows", "mode", "setting", "output_dir", "record"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("num_steps", "max_length", "pairs_per_step", "threads", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("learning_rate", "beta"):
        parser.add_argument(f"--{name}", type=float, required=True)
    parser.add_argument("--adapter", help="PEFT directory with the adapter to begin with")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [json.loads(line) for line in Path(options.rows).read_text(encoding="utf-8").splitlines()]
    dtype = torch.float32 if options.setting in ("master", "exact") else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype, attn_implementation="sdpa")
    model.config.use_cache = False
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    recorder = Recorder(Path(options.record))
    MeasuredTrainer.recorder = recorder
    trainer = MeasuredTrainer(
        model=model,
        args=settings(options),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(options.model),
        peft_config=lora if options.mode == "lora" else None,
        callbacks=[recorder],
    )
    if options.mode == "lora":
        left = set_peft_model_state_dict(
            trainer.model, load_file(Path(options.adapter) / "adapter_model.safetensors")
        ).unexpected_keys
        if left:
            raise SystemExit(f"the adapter has weights that PEFT's does not: {left[:3]}")
    num_tokens = sum(2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)
    print(f"tokens in the data set: {num_tokens}", flush=True)
    recorder.last = time.perf_counter()
    trainer.train()


if __name__ == "__main__":
    main()
