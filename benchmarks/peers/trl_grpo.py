"""TRL's side of `benchmarks/rl.py`; runs in an environment of its own: python trl_grpo.py SETTINGS_JSON RESULT_FILE."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


def reward(completions, **columns):
    return [len(set(text.split())) / max(len(text.split()), 1) for text in completions]


class Timed(GRPOTrainer):
    """Adds up the seconds of generation."""

    generation = 0.0

    def _generate(self, *given, **named):
        begun = time.perf_counter()
        found = super()._generate(*given, **named)
        Timed.generation += time.perf_counter() - begun
        return found


class Steps(TrainerCallback):
    """Notes seconds of each step."""

    def __init__(self) -> None:
        self.found: list[dict[str, float]] = []

    def on_step_begin(self, args, state, control, **_):
        self.begun, Timed.generation = time.perf_counter(), 0.0

    def on_step_end(self, args, state, control, **_):
        self.found.append({"step": time.perf_counter() - self.begun, "generation": Timed.generation})


def main() -> None:
    settings, result = json.loads(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(settings["threads"])
    dtype = torch.bfloat16 if settings["dtype"] == "bf16" else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(settings["model"], padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=dtype, attn_implementation="sdpa")
    rows = [json.loads(line) for line in Path(settings["prompts"]).read_text(encoding="utf-8").splitlines()]
    asked = [row.get("prompt") or row.get("src") or row.get("instruction") for row in rows]
    chats = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        for text in asked
    ]
    config = GRPOConfig(
        output_dir=str(result.parent / "out"),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=settings["prompts_per_step"] * settings["samples"],
        num_generations=settings["samples"],
        max_completion_length=settings["tokens"],
        generation_kwargs={"min_new_tokens": settings["tokens"]},
        max_steps=settings["steps"],
        beta=settings["beta"],
        gradient_checkpointing=False,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        temperature=1.0,
    )
    steps = Steps()
    data = Dataset.from_list([{"prompt": text} for text in chats])
    trainer = Timed(model=model, args=config, train_dataset=data, processing_class=tokenizer, reward_funcs=reward)
    trainer.add_callback(steps)
    trainer.train()
    result.write_text(json.dumps(steps.found))


if __name__ == "__main__":
    main()
