"""Seconds and memory of a step on pairs of answers, beside TRL's DPOTrainer, on this machine, in one run.

    python benchmarks/dpo.py --model DIR --pairs pairs.jsonl

Both sides train on the same ids, as `oarsmith dpo` cuts them, in the same order, with the same loss, beta, AdamW and
learning rate, LoRA from the same first weights; pairs that do not fit `max_length` are left out. How it is measured is
told in `turns.py`. A step's seconds are given twice: with the reference's log-probabilities known before, and with
the pass that computes them shared out over one epoch. At the end stand both sides' losses and log-probabilities, and
those of a few steps in fp32, where both have to be the same but for rounding.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from dpo_table import EXACT, PEERS, agreement, table, with_reference
from turns import OURS, Measurement, Run, Turns, machine, our_command, our_steps, peer_command, peer_steps
from watched import Watched

from oarsmith.adapters.peft_layout import write_adapter
from oarsmith.config.load import load_config
from oarsmith.config.registry import config_class
from oarsmith.data.answers import Answered

MODES = ("full", "lora", "lora-int8")
SEED = 42
WARMUP_STEPS = 1
BETA = 0.1
LEARNING_RATES = {"full": 1e-6, "lora": 5e-5}
# The line of `oarsmith dpo` on its reference pass.
REFERENCE = re.compile(r"^([\d,]+) tokens in .* \(([\d.,]+) tokens/s\)$", re.MULTILINE)


def options_from_command_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Oarsmith beside TRL on the same pairs of answers.")
    parser.add_argument("--model", required=True, help="Hugging Face directory that both sides read")
    parser.add_argument("--pairs", required=True, help="jsonl with a pair a line, in a format that oarsmith dpo reads")
    parser.add_argument("--modes", nargs="*", choices=MODES, default=["full", "lora"])
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured")
    parser.add_argument("--steps", type=int, default=4, help="measured steps, after one warm-up step")
    parser.add_argument("--batch", type=int, default=4, help="pairs a step")
    parser.add_argument("--max_length", type=int, default=1024, help="tokens of a prompt with one answer at most")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--exact_steps", type=int, default=2, help="steps of the comparison in fp32; 0: none")
    parser.add_argument("--json", help="also write every measurement to this file")
    options = parser.parse_args()
    if min(options.rounds, options.steps, options.batch) < 1:
        parser.error("rounds, steps and batch must be at least 1")
    if not 0 <= options.exact_steps <= WARMUP_STEPS + options.steps:
        parser.error("exact_steps can be at most one more than steps")
    return options


def systems_of(options: argparse.Namespace, mode: str) -> list[str]:
    """Adapters are fp32 everywhere: what an update rule with fp32 weights costs is a question of full fine-tuning."""
    return [name for name in options.peers if mode == "full" or name != "master"] + [OURS]


class Work:
    """The files that all trainers read, and how each is started."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.folder = folder
        self.num_steps = WARMUP_STEPS + options.steps
        self._write_pairs()

    def start(self, mode: str, system: str, num_steps: int, folder: Path) -> Run:
        """One run of `system`. LoRA's peers train on a bf16 base, also beside ours on an int8 one."""
        if system == OURS:
            # Its reference pass is measured too.
            shutil.rmtree(self.caches(mode) / "oarsmith" / "references", ignore_errors=True)
            return self._ours(self._our_keys(mode) | {"output_dir": folder / "run", "max_steps": num_steps}, folder)
        options, kind = self.options, mode.partition("-")[0]
        keys = {
            "model": options.model,
            "rows": self.folder / "ids.jsonl",
            "mode": kind,
            "setting": system,
            "output_dir": folder / "run",
            "record": folder / "steps.jsonl",
            "learning_rate": LEARNING_RATES[kind],
            "beta": BETA,
            "num_steps": num_steps,
            "max_length": options.max_length,
            "pairs_per_step": options.batch,
            "threads": options.threads,
            "seed": SEED,
        }
        if kind == "lora":
            keys |= {"adapter": self._first_adapter()}
        return Run(
            command=peer_command(sys.executable, "trl_dpo.py", keys),
            record_file=folder / "steps.jsonl",
            read=peer_steps,
        )

    def caches(self, mode: str) -> Path:
        """Where `Turns` lets ours keep what it compiles."""
        return self.folder / "caches" / f"{mode}-{OURS}"

    def _write_pairs(self) -> None:
        """`pairs.jsonl` for ours: the first rows that fit; `ids.jsonl` for the peers: what ours makes of them, in the
        order in which it trains."""
        options, needed = self.options, self.num_steps * self.options.batch
        lines = Path(options.pairs).read_text(encoding="utf-8").splitlines()
        rows = [row for row in self._data(options.pairs).rows.train if longest(row) <= options.max_length][:needed]
        if len(rows) < needed:
            sys.exit(f"{options.pairs}: {len(rows)} pairs fit in {options.max_length} tokens, {needed} are needed")
        chosen = [lines[int(row.where.rpartition(":")[2]) - 1] for row in rows]
        (self.folder / "pairs.jsonl").write_text("".join(line + "\n" for line in chosen), encoding="utf-8")
        data = self._data(self.folder / "pairs.jsonl")
        by_place = {row.where: row for row in data.rows.train}
        places = [place for index in range(self.num_steps) for place in data.train.batch_at(0, index).where]
        assert sorted(places) == sorted(by_place), "an epoch is every pair once"
        with (self.folder / "ids.jsonl").open("w") as file:
            for row in (by_place[place] for place in places):
                ids = [part.tolist() for part in (row.prompt, *row.answers)]
                file.write(json.dumps(dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), ids, strict=True))) + "\n")

    def _data(self, pairs: str | Path) -> Any:
        recipe, config, start = self._opened(self._our_keys("full") | {"dataset_name_or_path": pairs})
        return recipe.build_data(config, start, recipe.tokenizer(config))

    def _first_adapter(self) -> Path:
        """The adapter that ours begins with, in PEFT's layout; written once."""
        folder = self.folder / "adapter"
        if not folder.exists():
            recipe, config, start = self._opened(self._our_keys("lora"))
            write_adapter(recipe.load_model(config, start, torch.device("cpu")), folder, base=self.options.model)
        return folder

    def _opened(self, keys: dict[str, object]) -> tuple[Any, Any, Any]:
        """The recipe of `oarsmith dpo`, its configuration and where it starts."""
        words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
        recipe = importlib.import_module("oarsmith.jobs.dpo").RECIPE
        resolved, start = recipe.start(load_config(config_class("dpo"), None, words), torch.device("cpu"))
        return recipe, resolved.config, start

    def _our_keys(self, mode: str) -> dict[str, object]:
        options, kind = self.options, mode.partition("-")[0]
        keys = {
            "model_name_or_path": options.model,
            "dataset_name_or_path": self.folder / "pairs.jsonl",
            "max_length": 2 * options.max_length,  # ours counts both answers
            "zero_padding": "false",
            "per_device_train_batch_size": options.batch,
            "beta": BETA,
            "learning_rate": LEARNING_RATES[kind],
            "lr_scheduler_type": "constant",
            "dtype": "fp32" if mode.endswith("fp32") else "bf16",
            "device": "cpu",
            "num_threads": options.threads,
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": "true",
            "seed": SEED,
        }
        if kind == "lora":
            keys |= {"lora": "true", "lora_rank": 16, "lora_alpha": 32, "lora_target_modules": "all-linear"}
        return keys | ({"weight_quantize_algo": "a8w8linear"} if mode == "lora-int8" else {})

    def _ours(self, keys: dict[str, object], folder: Path) -> Run:
        run_folder = folder / "run"

        def read(seen: Watched, output: str) -> tuple[list[dict[str, float]], int]:
            found = REFERENCE.search(output)
            if found is None:
                raise SystemExit(f"no line on the reference pass in the output:\n{output[-2000:]}")
            tokens, rate = (float(number.replace(",", "")) for number in found.groups())
            records = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
            steps = [
                step | {key: record[key] for key in ("logps_chosen", "logps_rejected")} | {"reference_s": tokens / rate}
                for step, record in zip(our_steps(run_folder, seen), (r for r in records if "loss" in r), strict=True)
            ]
            return steps, json.loads((run_folder / "data_report.json").read_text())["train"]["tokens"]

        return Run(command=our_command("dpo", keys), record_file=run_folder / "timing.jsonl", read=read)


def longest(row: Answered) -> int:
    """Tokens of the prompt with the longer answer."""
    return len(row.prompt) + max(map(len, row.answers))


def main() -> None:
    options = options_from_command_line()
    facts = machine(options.threads, ("torch", "transformers", "trl", "peft", "accelerate"))
    found: list[Measurement] = []
    with tempfile.TemporaryDirectory(prefix="oarsmith-bench-work-") as name:
        work = Work(options, Path(name))
        counts = {"num_warmup": WARMUP_STEPS, "num_steps": options.steps, "num_rounds": options.rounds}
        shared = {"start": work.start, "threads": options.threads, "caches": Path(name) / "caches"}
        turns = Turns(**shared, **counts)
        for mode in options.modes:
            names = systems_of(options, mode)
            turns.losses(mode, OURS, 1)  # compiles its kernels; the peers compile nothing
            for round_ in range(options.rounds):
                for system in names if round_ % 2 == 0 else names[::-1]:
                    one = turns.measure(mode, system, round_)
                    found.append(one)
                    said = f"{one.seconds_per_step:.2f} s/step, {with_reference(one):.2f} s with the reference, "
                    said += f"{one.peak_mb:.0f} MiB, CPU {one.cpu_share:.0%}"
                    print(f"{mode} round {round_ + 1} {system}: {said}", file=sys.stderr, flush=True)
        exact = []
        if options.exact_steps:
            turns = Turns(**shared, num_warmup=0, num_steps=options.exact_steps, num_rounds=1)
            modes = dict.fromkeys(f"{mode.partition('-')[0]}-fp32" for mode in options.modes)
            exact = [turns.measure(mode, system, 0) for mode in modes for system in (EXACT, OURS)]
    print(f"\n{table(found)}\n\n{agreement([*found, *exact])}\n")
    facts |= {
        "model": options.model,
        "pairs": options.pairs,
        "batch": f"{options.batch} pairs a step, at most {options.max_length} tokens of prompt and answer, bf16",
        "steps": f"{WARMUP_STEPS} warm-up + {options.steps} measured, {options.rounds} rounds",
        "epoch": f"{work.num_steps * options.batch} pairs",
    }
    for key, value in facts.items():
        print(f"{key}: {value}")
    totals = {PEERS.get(one.system, one.system): one.dataset_tokens for one in found}
    print("tokens in the data set (ours: a prompt once): " + ", ".join(f"{s} {n:,}" for s, n in totals.items()))
    if options.json:
        content = {**facts, "measurements": [asdict(one) for one in (*found, *exact)]}
        Path(options.json).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
