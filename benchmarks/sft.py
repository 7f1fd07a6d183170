"""Fine-tuning speed and memory, beside TRL's SFTTrainer, on this machine, in one run.

    python benchmarks/sft.py --model DIR --data rows.jsonl

Every measurement is a process of its own: one warm-up step, then the measured ones. The trainers take turns within a
round and the order is turned around from round to round, so that a machine that is busy for a while is busy for
everybody; ratios are taken within a round. Tokens are counted from the ids each side trains, padding left out.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from watched import Watched, watch

import oarsmith

PEER = Path(__file__).parent / "peers" / "trl_sft.py"
OURS = "oarsmith"
PEERS = {"packed": "TRL, packing", "default": "TRL, defaults"}
SEED = 42


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One process. Rates are over the measured steps: real tokens (no padding) per second of wall time."""

    mode: str
    system: str
    round: int
    tokens_per_second: float
    tokens_per_step: float
    seconds_per_step: float
    peak_mb: float
    first_step_s: float
    cpu_share: float
    losses: list[float]
    dataset_tokens: int


def options_from_command_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Oarsmith beside TRL's SFTTrainer on the same rows.")
    parser.add_argument("--model", required=True, help="Hugging Face directory that both sides read")
    parser.add_argument("--data", required=True, help='jsonl with one {"src": question, "tgt": answer} a line')
    parser.add_argument("--modes", nargs="+", choices=["full", "lora"], default=["full", "lora"])
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured")
    parser.add_argument("--steps", type=int, default=4, help="measured steps, after one warm-up step")
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--batch_tokens", type=int, default=2048, help="tokens a step, a multiple of max_length")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", help="also write every measurement to this file")
    options = parser.parse_args()
    if options.batch_tokens % options.max_length or min(options.rounds, options.steps, options.batch_tokens) < 1:
        parser.error("batch_tokens must be a multiple of max_length; rounds and steps at least 1")
    return options


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


def measure(options: argparse.Namespace, mode: str, system: str, round_: int, rows: Path) -> Measurement:
    """Run one trainer once."""
    with tempfile.TemporaryDirectory(prefix="oarsmith-bench-") as name:
        folder = Path(name)
        command, record_file = (our_command if system == OURS else peer_command)(options, mode, system, rows, folder)
        output = folder / "output.txt"
        seen = watch(command, record_file, options.steps + 1, threads=options.threads, output=output)
        steps, dataset_tokens = (our_steps if system == OURS else peer_steps)(folder, seen, output)
    measured = steps[1:]
    seconds, tokens = sum(step["seconds"] for step in measured), sum(step["tokens"] for step in measured)
    return Measurement(
        mode=mode,
        system=system,
        round=round_,
        tokens_per_second=tokens / seconds,
        tokens_per_step=tokens / len(measured),
        seconds_per_step=seconds / len(measured),
        peak_mb=seen.peak_mb,
        first_step_s=seen.first_step_s,
        cpu_share=seen.cpu_share,
        losses=[step["loss"] for step in steps],
        dataset_tokens=dataset_tokens,
    )


def our_command(options: argparse.Namespace, mode: str, _: str, rows: Path, folder: Path) -> tuple[list[str], Path]:
    """The command a user types: the whole job, its log, its final model and its report included."""
    keys = {
        "model_name_or_path": options.model,
        "dataset_name_or_path": rows / "pairs.jsonl",
        "output_dir": folder / "run",
        "max_steps": options.steps + 1,
        "max_length": options.max_length,
        "per_device_train_batch_size": options.batch_tokens // options.max_length,
        "zero_padding": "true",
        "dtype": "bf16",
        "device": "cpu",
        "num_threads": options.threads,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": "true",
        "seed": SEED,
    }
    if mode == "lora":
        keys |= {"lora": "true", "lora_rank": 16, "lora_alpha": 32, "lora_target_modules": "all-linear"}
    words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    return [sys.executable, "-m", "oarsmith", "sft", *words], folder / "run" / "timing.jsonl"


def our_steps(folder: Path, seen: Watched, _: Path) -> tuple[list[dict[str, float]], int]:
    """Seconds from timing.jsonl, tokens and loss from log.jsonl."""
    lines = (folder / "run" / "log.jsonl").read_text().splitlines()
    log = [record for record in map(json.loads, lines) if "loss" in record]
    steps, before = [], 0
    for record, timing in zip(log, seen.records, strict=True):
        tokens, before = record["tokens"] - before, record["tokens"]
        seconds = tokens / timing["tokens_per_second"]
        steps.append({"tokens": tokens, "seconds": seconds, "loss": record["loss"]})
    report = json.loads((folder / "run" / "data_report.json").read_text())
    return steps, report["train"]["tokens"]


def peer_command(
    options: argparse.Namespace, mode: str, system: str, rows: Path, folder: Path
) -> tuple[list[str], Path]:
    record_file = folder / "steps.jsonl"
    keys = {
        "model": options.model,
        "rows": rows / "rendered.jsonl",
        "mode": mode,
        "setting": system,
        "output_dir": folder / "run",
        "record": record_file,
        "num_steps": options.steps + 1,
        "max_length": options.max_length,
        "rows_per_step": options.batch_tokens // options.max_length,
        "threads": options.threads,
        "seed": SEED,
    }
    return [sys.executable, str(PEER), *(w for k, v in keys.items() for w in (f"--{k}", str(v)))], record_file


def peer_steps(_: Path, seen: Watched, output: Path) -> tuple[list[dict[str, float]], int]:
    line = next(text for text in output.read_text().splitlines() if text.startswith("tokens in the data set"))
    return seen.records, int(line.rpartition(" ")[2])


def table(found: list[Measurement], systems: list[str]) -> str:
    """A Markdown table: medians over the rounds, with the smallest and the largest value."""
    heads = ["", "", "real tokens/s", "Oarsmith / peer", "s/step", "real tokens/step", "peak MiB"]
    heads += ["start to end of step 1, s", "CPU"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for mode in dict.fromkeys(one.mode for one in found):
        ours = [one for one in found if (one.mode, one.system) == (mode, OURS)]
        for system in systems:
            rows = [one for one in found if (one.mode, one.system) == (mode, system)]
            ratios = [a.tokens_per_second / b.tokens_per_second for a, b in zip(ours, rows, strict=True)]
            cells = [
                mode,
                PEERS.get(system, "**Oarsmith**"),
                spread([one.tokens_per_second for one in rows], 1),
                "" if system == OURS else spread(ratios, 2),
                spread([one.seconds_per_step for one in rows], 2),
                f"{statistics.median(one.tokens_per_step for one in rows):.0f}",
                spread([one.peak_mb for one in rows], 0),
                spread([one.first_step_s for one in rows], 1),
                f"{statistics.median(one.cpu_share for one in rows):.0%}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(values: list[float], digits: int) -> str:
    middle = f"{statistics.median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def conditions(options: argparse.Namespace) -> dict[str, Any]:
    """What the numbers depend on."""
    cpu = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")]
    packages = ("torch", "transformers", "trl", "peft", "accelerate")
    return {
        "cpu": f"{names[0] if names else platform.machine()}, {os.cpu_count()} CPUs, {options.threads} threads",
        "model": options.model,
        "data": options.data,
        "batch": f"{options.batch_tokens} tokens a step at most, rows of {options.max_length}, bf16",
        "steps": f"1 warm-up + {options.steps} measured, {options.rounds} rounds",
        "versions": {"oarsmith": oarsmith.__version__, **{name: importlib.metadata.version(name) for name in packages}},
        "load_before": os.getloadavg()[0],
    }


def main() -> None:
    options = options_from_command_line()
    facts = conditions(options)
    systems = [*options.peers, OURS]
    found: list[Measurement] = []
    with tempfile.TemporaryDirectory(prefix="oarsmith-bench-rows-") as name:
        write_rows(options.model, options.data, Path(name))
        for mode in options.modes:
            for round_ in range(options.rounds):
                for system in systems if round_ % 2 == 0 else systems[::-1]:
                    one = measure(options, mode, system, round_, Path(name))
                    found.append(one)
                    note = f"{one.tokens_per_second:.1f} real tokens/s, {one.peak_mb:.0f} MiB, CPU {one.cpu_share:.0%}"
                    print(f"{mode} round {round_ + 1} {system}: {note}", file=sys.stderr, flush=True)
    print("\n" + table(found, systems) + "\n")
    for name, value in facts.items():
        print(f"{name}: {value}")
    totals = {system: next(one.dataset_tokens for one in found if one.system == system) for system in systems}
    print("tokens in the data set, as each side cuts it: " + ", ".join(f"{s} {n:,}" for s, n in totals.items()))
    if options.json:
        content = {**facts, "measurements": [asdict(one) for one in found]}
        Path(options.json).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
