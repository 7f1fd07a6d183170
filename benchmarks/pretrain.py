"""Pretraining speed and memory, beside the Hugging Face Trainer, on this machine, in one run.

    python benchmarks/pretrain.py

A Llama of 15M parameters (hidden 288, 6 layers, 6 heads, 32,000 tokens) on rows of 512, 8 a step: same first weights,
same rows in the same order, same AdamW. How it is measured is told in `turns.py`; ours runs twice, once with half the
rows of a step at a time, which takes less memory. `--curves picture.png` trains longer and draws the losses of both
sides on top of each other. `--model DIR --corpus PREFIX` take another model (its config.json and tokenizer, with fresh
weights) and real text, as `oarsmith preprocess` leaves them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from made_up import draw_weights, write_corpus, write_llama, write_tokenizer
from roofline import matmul_rate, mean_context, model_size
from same_batches import write_batches
from turns import (
    LEAN,
    OURS,
    Run,
    Turns,
    draw_curves,
    machine,
    our_command,
    our_steps,
    peer_command,
    peer_steps,
    table,
)

PEERS = {
    "compiled": "HF Trainer, bf16 weights, torch.compile",
    "master": "HF Trainer, fp32 weights, bf16 autocast, torch.compile",
    "eager": "HF Trainer, bf16 weights",
    "default": "HF Trainer, defaults (fp32)",
}
SEED = 42
HIDDEN, LAYERS, HEADS = 288, 6, 6
# The second step may still compile something (a shape seen for the second time).
WARMUP_STEPS = 2
OPTIMIZER: dict[str, object] = {"weight_decay": 0.1, "adam_beta2": 0.95}
VOCAB_SIZE = 32_000


def options_from_command_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Oarsmith beside the Hugging Face Trainer on the same rows.")
    parser.add_argument("--corpus", help=".bin/.idx pair of real text, without its ending; not given: made-up words")
    parser.add_argument("--model", help="folder with config.json and the tokenizer of --corpus; not given: 15M Llama")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="highest of a cosine down to a tenth of it")
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured")
    parser.add_argument("--steps", type=int, default=8, help="measured steps, after two warm-up steps")
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=8, help="rows a step")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--curves", help="draw the loss of a longer run of each into this picture")
    parser.add_argument("--curve_steps", type=int, default=200)
    parser.add_argument("--curve_peers", nargs="+", choices=list(PEERS), default=["default", "master"])
    parser.add_argument("--json", help="also write every measurement to this file")
    options = parser.parse_args()
    if (options.corpus is None) != (options.model is None):
        parser.error("--corpus and --model go together")
    if min(options.steps, options.max_length, options.batch_size, options.curve_steps) < 1 or options.rounds < 0:
        parser.error("counts must be at least 1 (rounds: 0)")
    return options


class Work:
    """The files that all trainers read."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.model = folder / "model"
        self.rows = folder / "rows.npz"
        num_steps = max(WARMUP_STEPS + options.steps, options.curve_steps if options.curves else 0)
        self.num_tokens = num_steps * options.batch_size * options.max_length
        if options.corpus is None:
            self.corpus = folder / "corpus" / "made-up"
            # Twice as much as is read, so that nothing is seen again.
            write_corpus(self.corpus, 2 * self.num_tokens + 10_000, VOCAB_SIZE)
            write_tokenizer(self.model, VOCAB_SIZE)
            shape = {"hidden": HIDDEN, "layers": LAYERS, "heads": HEADS}
            write_llama(self.model, **shape, vocab_size=VOCAB_SIZE, positions=max(1024, options.max_length))
        else:
            self.corpus = Path(options.corpus)
            copy_without_weights(Path(options.model), self.model)
            draw_weights(self.model)
        write_batches("pretrain", self._keys(folder / "unused", num_steps), num_steps, self.rows)

    def _keys(self, run_folder: Path, num_steps: int) -> dict[str, object]:
        options = self.options
        return {
            "model_name_or_path": self.model,
            "input_dir": self.corpus,
            "split": "100,0,0",
            "data_cache": run_folder.with_name("index-cache"),
            "continue_training": "true",
            "output_dir": run_folder,
            "max_seq_length": options.max_length,
            "per_device_train_batch_size": options.batch_size,
            "max_steps": num_steps,
            "lr_scheduler_type": "cosine",
            "max_grad_norm": 1.0,
            "dtype": "bf16",
            "device": "cpu",
            "num_threads": options.threads,
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": "true",
            **self._update_rule(num_steps),
        }

    def _update_rule(self, num_steps: int) -> dict[str, object]:
        """AdamW's keys, the same for both sides; one step in twenty is warm-up, but not in a run of a few steps."""
        rate = self.options.learning_rate
        rates = {"learning_rate": rate, "min_learning_rate": rate / 10, "warmup_steps": num_steps // 20}
        return {**rates, **OPTIMIZER, "seed": SEED}

    def start(self, _: str, system: str, num_steps: int, folder: Path) -> Run:
        """How `system` is started."""
        if system in (OURS, LEAN):
            ours = self._keys(folder / "run", num_steps)
            if system == LEAN and self.options.batch_size % 2 == 0:
                ours |= {"per_device_train_batch_size": self.options.batch_size // 2, "gradient_accumulation_steps": 2}
            return Run(
                command=our_command("pretrain", ours),
                record_file=folder / "run" / "timing.jsonl",
                read=lambda seen, _: (our_steps(folder / "run", seen), self.num_tokens),
            )
        keys: dict[str, object] = {"model": self.model, "rows": self.rows, "setting": system}
        keys |= {"output_dir": folder / "run", "num_steps": num_steps, "threads": self.options.threads}
        keys |= self._update_rule(num_steps)
        record = folder / "steps.jsonl"
        command = peer_command(sys.executable, "hf_pretrain.py", {**keys, "record": record})
        return Run(command=command, record_file=record, read=peer_steps)


def copy_without_weights(source: Path, target: Path) -> None:
    """config.json and the tokenizer's files."""
    target.mkdir(parents=True)
    for path in source.glob("*.json"):
        if not path.name.endswith(".index.json"):
            shutil.copyfile(path, target / path.name)
    if (source / "tokenizer.model").is_file():
        shutil.copyfile(source / "tokenizer.model", target / "tokenizer.model")


def main() -> None:
    options = options_from_command_line()
    facts = machine(options.threads, ("torch", "transformers", "accelerate"))
    rate = matmul_rate(options.threads)
    systems = [*options.peers, OURS, LEAN]
    with tempfile.TemporaryDirectory(prefix="oarsmith-bench-work-") as name:
        work = Work(options, Path(name))
        turns = Turns(
            start=work.start,
            num_warmup=WARMUP_STEPS,
            num_steps=options.steps,
            num_rounds=options.rounds,
            threads=options.threads,
            caches=Path(name) / "caches",
        )
        size = model_size(work.model)
        flops = size.flops_per_token(mean_context([options.max_length]), frozen=False)
        mode = f"{size.matrix_parameters / 1e6:.1f}M"
        found = turns.measure_all([mode], lambda _: systems) if options.rounds else []
        if found:
            print("\n" + table(found, PEERS, turns.cold, lambda one: one.tokens_per_second * flops / rate) + "\n")
        facts |= {
            "corpus": options.corpus or "made-up words",
            "batch": f"{options.batch_size} rows of {options.max_length} tokens a step",
            "steps": f"{WARMUP_STEPS} warm-up + {options.steps} measured, {options.rounds} rounds",
            "matrix parameters": f"{size.matrix_parameters:,}, {flops / 1e9:.4f} GFLOP a token, forwards and backwards",
            "bf16 matrix rate": f"{rate / 1e9:.0f} GFLOP/s",
        }
        for key, value in facts.items():
            print(f"{key}: {value}")
        if options.curves:
            curves = {PEERS[peer]: turns.losses(mode, peer, options.curve_steps) for peer in options.curve_peers}
            curves["Oarsmith"] = turns.losses(mode, OURS, options.curve_steps)
            title = f"{mode} parameters, same first weights, same rows in the same order"
            print(draw_curves(Path(options.curves), curves, title))
            facts["curves"] = curves
    if options.json:
        content = {**facts, "measurements": [asdict(one) for one in found]}
        Path(options.json).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
