"""Fine-tuning speed and memory, beside TRL's SFTTrainer and LLaMA-Factory, on this machine, in one run.

    python benchmarks/sft.py --model DIR --data rows.jsonl

How it is measured is told in `turns.py`. Ours runs twice: as fast as it can, all rows of a step at once; and in less
memory, LoRA half of them at a time, full fine-tuning computing activations again in backward. Tokens are counted from
the ids each side trains, padding left out.
`--curves picture.png` trains all weights for longer, beside the Hugging Face Trainer on the very same batches, and
draws the losses on top of each other: fp32, fp32 weights under bf16 autocast, and ours.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from roofline import matmul_rate, mean_context, model_size
from same_batches import write_batches
from turns import (
    LEAN,
    OURS,
    Measurement,
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
from watched import Watched

import oarsmith

PEERS = {
    "packed": "TRL, packing",
    "master": "TRL, packing, fp32 weights, bf16 autocast",
    "default": "TRL, defaults",
    "llamafactory": "LLaMA-Factory",
}
MODES = ("full", "lora", "lora-int8")
CURVES = {"default": "HF Trainer, fp32", "amp": "HF Trainer, fp32 weights, bf16 autocast", OURS: "Oarsmith"}
SEED = 42
WARMUP_STEPS = 1
LEARNING_RATES = {"full": 2e-5, "lora": 2e-4}
CURVE_BATCH = 8


def options_from_command_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Oarsmith beside TRL and LLaMA-Factory on the same rows.")
    parser.add_argument("--model", required=True, help="Hugging Face directory that all sides read")
    parser.add_argument("--data", required=True, help='jsonl with one {"src": question, "tgt": answer} a line')
    parser.add_argument("--modes", nargs="*", choices=MODES, default=list(MODES))
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), help="default: all that are installed")
    parser.add_argument("--llamafactory", metavar="PYTHON", help="the Python that has LLaMA-Factory")
    parser.add_argument("--llamafactory_template", default="smollm2", help="its name for the model's chat template")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured")
    parser.add_argument("--steps", type=int, default=4, help="measured steps, after one warm-up step")
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--batch_tokens", type=int, default=2048, help="tokens a step, a multiple of max_length")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--curves", help="draw the loss of a longer run of each into this picture")
    parser.add_argument("--curve_steps", type=int, default=40)
    parser.add_argument("--json", help="also write every measurement to this file")
    options = parser.parse_args()
    if options.batch_tokens % options.max_length or min(options.steps, options.batch_tokens, options.curve_steps) < 1:
        parser.error("batch_tokens must be a multiple of max_length; steps at least 1")
    if options.peers is None:
        options.peers = [name for name in PEERS if name != "llamafactory" or options.llamafactory]
    if "llamafactory" in options.peers and not options.llamafactory:
        parser.error("name the Python that has LLaMA-Factory: --llamafactory PYTHON")
    return options


def systems_of(options: argparse.Namespace, mode: str) -> list[str]:
    """Adapters are fp32 everywhere: what an update rule with fp32 weights costs is a question of full fine-tuning."""
    return [name for name in options.peers if mode == "full" or name != "master"] + [OURS, LEAN]


def write_rows(model: str, data: str, folder: Path) -> None:
    """The rows for both sides: as src/tgt, and rendered with the model's chat template as prompt and completion."""
    tokenizer = oarsmith.load_tokenizer(model)
    pairs, rendered = [], []
    for number, line in enumerate(Path(data).read_text(encoding="utf-8").splitlines(), start=1):
        row = json.loads(line)
        if not isinstance(row.get("src"), str) or not isinstance(row.get("tgt"), str):
            sys.exit(f"{data}:{number}: src and tgt must be texts (one question and one answer a row)")
        messages = [{"role": "user", "content": row["src"]}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": row["tgt"]}])
        if not whole.startswith(prompt):
            sys.exit(f"{data}:{number}: the template renders the answer differently from its generation prompt")
        pairs.append({"src": row["src"], "tgt": row["tgt"]})
        # Templates put a line break after the end-of-turn token; nothing trains on it here or there.
        rendered.append({"prompt": prompt, "completion": whole.removeprefix(prompt).rstrip("\n")})
    for name, rows in (("pairs.jsonl", pairs), ("rendered.jsonl", rendered)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def row_lengths(options: argparse.Namespace, folder: Path) -> list[int]:
    """Tokens of each row as it is trained on."""
    tokenizer = oarsmith.load_tokenizer(options.model)
    rows = map(json.loads, (folder / "rendered.jsonl").read_text(encoding="utf-8").splitlines())
    lengths = (len(tokenizer.encode(row["prompt"] + row["completion"], add_special_tokens=False)) for row in rows)
    return [min(length, options.max_length) for length in lengths]


def versions_in(python: str, packages: tuple[str, ...]) -> dict[str, str]:
    """The versions another Python has, by names that say so."""
    script = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    done = subprocess.run([python, "-c", script, *packages], capture_output=True, text=True, check=True)
    return {f"LLaMA-Factory's {name}": version for name, version in json.loads(done.stdout).items()}


class Work:
    """The files that all trainers read, and how each is started."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.folder = folder
        write_rows(options.model, options.data, folder)

    def start(self, mode: str, system: str, num_steps: int, folder: Path) -> Run:
        """One run of `system`. LoRA's peers train on a bf16 base, also beside ours on an int8 one."""
        options = self.options
        kind = mode.partition("-")[0]
        if system in (OURS, LEAN):
            rows, passes = options.batch_tokens // options.max_length, 1
            if system == LEAN and kind == "lora" and rows % 2 == 0:
                rows, passes = rows // 2, 2
            keys = self._our_keys(folder / "run", num_steps) | {"zero_padding": "true"}
            keys |= {"per_device_train_batch_size": rows, "gradient_accumulation_steps": passes}
            if system == LEAN and kind == "full":  # where gradients would have to add up in fp32
                keys |= {"recompute": "true"}
            if kind == "lora":
                keys |= {"lora": "true", "lora_rank": 16, "lora_alpha": 32, "lora_target_modules": "all-linear"}
            if mode == "lora-int8":
                keys |= {"weight_quantize_algo": "a8w8linear"}
            return self._ours(keys, folder)
        keys = {
            "model": options.model,
            "rows": self.folder,
            "mode": kind,
            "setting": system,
            "output_dir": folder / "run",
            "record": folder / "steps.jsonl",
            "learning_rate": LEARNING_RATES[kind],
            "num_steps": num_steps,
            "max_length": options.max_length,
            "rows_per_step": options.batch_tokens // options.max_length,
            "threads": options.threads,
            "seed": SEED,
        }
        if system == "llamafactory":
            keys |= {"template": options.llamafactory_template}
            command = peer_command(options.llamafactory, "llamafactory_sft.py", keys)
        else:
            command = peer_command(sys.executable, "trl_sft.py", keys)
        return Run(command=command, record_file=folder / "steps.jsonl", read=peer_steps)

    def start_curve(self, _: str, system: str, num_steps: int, folder: Path) -> Run:
        """All weights on the same batches: padded by the Trainer, end to end by ours."""
        rows = {"zero_padding": "false", "per_device_train_batch_size": CURVE_BATCH}
        keys = self._our_keys(folder / "run", num_steps) | rows
        if system == OURS:
            return self._ours(keys, folder)
        rate = LEARNING_RATES["full"]
        batches, record = folder / "batches.npz", folder / "steps.jsonl"
        write_batches("sft", keys, num_steps, batches)
        peer: dict[str, object] = {"model": self.options.model, "rows": batches, "setting": system, "record": record}
        peer |= {
            "learning_rate": rate,
            "min_learning_rate": rate,
            "warmup_steps": 0,
            "weight_decay": 0.0,
            "adam_beta2": 0.999,
        }
        peer |= {"output_dir": folder / "peer", "num_steps": num_steps, "threads": self.options.threads, "seed": SEED}
        command = peer_command(sys.executable, "hf_pretrain.py", peer)
        return Run(command=command, record_file=record, read=peer_steps)

    def _our_keys(self, run_folder: Path, num_steps: int) -> dict[str, object]:
        return {
            "model_name_or_path": self.options.model,
            "dataset_name_or_path": self.folder / "pairs.jsonl",
            "output_dir": run_folder,
            "max_steps": num_steps,
            "max_length": self.options.max_length,
            "dtype": "bf16",
            "device": "cpu",
            "num_threads": self.options.threads,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": "true",
            "seed": SEED,
        }

    def _ours(self, keys: dict[str, object], folder: Path) -> Run:
        run_folder = folder / "run"

        def read(seen: Watched, _: str) -> tuple[list[dict[str, float]], int]:
            report = json.loads((run_folder / "data_report.json").read_text())
            return our_steps(run_folder, seen), report["train"]["tokens"]

        return Run(command=our_command("sft", keys), record_file=run_folder / "timing.jsonl", read=read)


def main() -> None:
    options = options_from_command_line()
    facts = machine(options.threads, ("torch", "transformers", "trl", "peft", "accelerate"))
    if "llamafactory" in options.peers:
        facts["versions"] |= versions_in(options.llamafactory, ("llamafactory", "transformers", "trl", "torch"))
    rate, size = matmul_rate(options.threads), model_size(Path(options.model))
    with tempfile.TemporaryDirectory(prefix="oarsmith-bench-work-") as name:
        work, caches = Work(options, Path(name)), Path(name) / "caches"
        counts = {"num_warmup": WARMUP_STEPS, "num_steps": options.steps, "num_rounds": options.rounds}
        turns = Turns(start=work.start, **counts, threads=options.threads, caches=caches)
        context = mean_context(row_lengths(options, Path(name)))

        def mfu(one: Measurement) -> float:
            return one.tokens_per_second * size.flops_per_token(context, frozen=one.mode != "full") / rate

        found = turns.measure_all(options.modes, lambda mode: systems_of(options, mode))
        if found:
            print("\n" + table(found, PEERS, turns.cold, mfu) + "\n")
        facts |= {
            "model": options.model,
            "data": options.data,
            "batch": f"{options.batch_tokens} tokens a step at most, rows of {options.max_length}, bf16",
            "steps": f"{WARMUP_STEPS} warm-up + {options.steps} measured, {options.rounds} rounds",
            "bf16 matrix rate": f"{rate / 1e9:.0f} GFLOP/s",
        }
        for key, value in facts.items():
            print(f"{key}: {value}")
        totals = {one.system: one.dataset_tokens for one in found}
        print("tokens in the data set, as each side cuts it: " + ", ".join(f"{s} {n:,}" for s, n in totals.items()))
        if options.curves:
            turns = Turns(start=work.start_curve, **counts, threads=options.threads, caches=caches)
            curves = {label: turns.losses("curve", system, options.curve_steps) for system, label in CURVES.items()}
            title = f"{Path(options.model).name}, all weights: the same batches of {CURVE_BATCH} rows"
            print(draw_curves(Path(options.curves), curves, title))
            facts["curves"] = curves
    if options.json:
        content = {**facts, "measurements": [asdict(one) for one in found]}
        Path(options.json).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
