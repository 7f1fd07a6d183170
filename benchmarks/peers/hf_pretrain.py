"""The peer of `benchmarks/pretrain.py`: the Hugging Face Trainer on given batches. It writes one line a step.

`compiled` is the fastest stock setting found on CPUs: bf16 weights and torch_compile. `master` updates fp32 weights, as
Oarsmith does, with bf16 autocast and torch_compile; `eager` and `amp` are these two without compiling; `default` is
what the Trainer does with a model as `from_pretrained(dtype="float32")` loads it: fp32, not compiled.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

SETTINGS: dict[str, dict[str, Any]] = {
    "compiled": {"dtype": torch.bfloat16, "bf16": False, "torch_compile": True},
    "master": {"dtype": torch.float32, "bf16": True, "torch_compile": True},
    "eager": {"dtype": torch.bfloat16, "bf16": False, "torch_compile": False},
    "amp": {"dtype": torch.float32, "bf16": True, "torch_compile": False},
    "default": {"dtype": torch.float32, "bf16": False, "torch_compile": False},
}


class Rows(torch.utils.data.Dataset):
    """Rows of ids with the token that follows each as its label, from the file that `same_batches.py` writes."""

    def __init__(self, path: Path) -> None:
        file = np.load(path)
        self._ids, self._labels, self._lengths = file["ids"], file["labels"], file["lengths"]
        self.rows_per_step = int(file["rows_per_step"][0])
        if not (file["rows_per_step"] == self.rows_per_step).all():
            raise SystemExit("the Trainer wants the same number of rows in every step")
        self.num_tokens = int(self._lengths.sum())

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        length = self._lengths[index]
        return self._ids[index, :length], self._labels[index, :length]


class Collator:
    """Pads a batch to its longest row and counts its tokens."""

    def __init__(self) -> None:
        self.num_tokens: list[int] = []

    def __call__(self, rows: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, torch.Tensor]:
        lengths = [len(ids) for ids, _ in rows]
        self.num_tokens.append(sum(lengths))
        ids_BL = torch.zeros(len(rows), max(lengths), dtype=torch.int64)
        labels_BL = torch.full_like(ids_BL, -100)
        for row, (ids, labels) in enumerate(rows):
            ids_BL[row, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
            labels_BL[row, : len(ids)] = torch.from_numpy(labels.astype(np.int64))
        # The model shifts `labels` itself, and would compute one position more than it trains; `shift_labels` are used
        # as they are.
        batch = {"input_ids": ids_BL, "labels": labels_BL, "shift_labels": labels_BL}
        if min(lengths) < max(lengths):
            batch["attention_mask"] = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        return batch


class Recorder(TrainerCallback):
    """Notes the seconds of each step, and its loss once the Trainer has logged it."""

    def __init__(self, path: Path, num_tokens: list[int]) -> None:
        self._path = path
        self._num_tokens = num_tokens
        self._last = time.perf_counter()
        self._seconds = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = time.perf_counter()
        self._seconds, self._last = now - self._last, now

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        step = state.global_step
        record = {"step": step, "seconds": self._seconds, "tokens": self._num_tokens[step - 1], "loss": logs["loss"]}
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "rows", "setting", "output_dir", "record"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("num_steps", "warmup_steps", "threads", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("learning_rate", "min_learning_rate", "weight_decay", "adam_beta2"):
        parser.add_argument(f"--{name}", type=float, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    setting = SETTINGS[options.setting]
    rows = Rows(Path(options.rows))
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=setting["dtype"], attn_implementation="sdpa")
    model.config.use_cache = False
    arguments = TrainingArguments(
        output_dir=options.output_dir,
        max_steps=options.num_steps,
        per_device_train_batch_size=rows.rows_per_step,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": options.min_learning_rate},
        warmup_steps=options.warmup_steps,
        weight_decay=options.weight_decay,
        adam_beta2=options.adam_beta2,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        bf16=setting["bf16"],
        torch_compile=setting["torch_compile"],
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
        dataloader_pin_memory=False,
        disable_tqdm=True,
        seed=options.seed,
    )
    collator = Collator()
    recorder = Recorder(Path(options.record), collator.num_tokens)
    print(f"tokens in the data set: {rows.num_tokens}", flush=True)
    Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator, callbacks=[recorder]).train()


if __name__ == "__main__":
    main()
