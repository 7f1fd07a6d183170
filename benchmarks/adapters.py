"""A training step of every adapter method beside PEFT's, in turns: seconds, memory, parameters.

    python benchmarks/adapters.py --model SmolLM2-135M [--methods full lora dora ...] [--json result.json]

Each measurement is a process of its own (`benchmarks/peers/adapter_step.py` for PEFT, this file for ours): bf16 base,
fp32 adapters, AdamW, the same ids: rows of one length, so that nobody pads. Ours is the step of `oarsmith sft`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from turns import machine, spread

from oarsmith.config.load import load_config
from oarsmith.config.sft import SftConfig
from oarsmith.data.batch import make_batch
from oarsmith.data.samples import Sample
from oarsmith.jobs.optimizers import make_optimizer
from oarsmith.jobs.start import from_checkpoint
from oarsmith.jobs.tuning import load_trainable
from oarsmith.losses.token import TokenCrossEntropy
from oarsmith.training.log import peak_memory_mb
from oarsmith.training.step import run_step

OURS, PEER = "Oarsmith", "PEFT"
# PEFT has these, with settings that make both do the same work; each is measured beside its own.
PEFT = (
    "full",
    "lora",
    "dora",
    "pissa",
    "olora",
    "adalora",
    "vera",
    "loha",
    "lokr",
    "ia3",
    "fourierft",
    "oft",
    "boft",
    "prefix_tuning",
    "prompt_tuning",
)
WITHOUT_RANK = frozenset({"full", "ia3", "fourierft", "oft", "boft", "prefix_tuning", "prompt_tuning"})
LOW_BIT = {"lora-int8": "a8w8linear", "lora-nf4": "nf4"}


def ids_of(rows: int, length: int, vocab_size: int) -> list[list[int]]:
    """Made-up rows: what they say does not change the time."""
    return [[(7919 * (row * length + at) + 13) % (vocab_size - 10) + 5 for at in range(length)] for row in range(rows)]


def ours(options: argparse.Namespace) -> dict[str, Any]:
    """One measurement of ours."""
    method, quantized = options.one.partition("-")[0], LOW_BIT.get(options.one)
    words = [options.model, "none", "--adapter_type", "none" if method == "full" else method, "--dtype", "bf16"]
    words += [] if method in WITHOUT_RANK else ["--lora_rank", "16"]
    words += [] if quantized is None else ["--weight_quantize_algo", quantized]
    torch.set_num_threads(options.threads)
    config = load_config(SftConfig, None, words).config
    start = from_checkpoint(config, Path(options.model))
    model = load_trainable(config, start, torch.device("cpu")).train()
    optimizer = make_optimizer(config, model)
    rows = ids_of(options.rows, options.length, start.vocab_size)
    ones = np.ones(options.length, np.float32)
    ones[0] = 0
    samples = [Sample(ids=np.array(ids, np.int32), weights=ones, where="made up") for ids in rows]
    batch, objective, seconds = make_batch(samples), TokenCrossEntropy(), []
    for _ in range(options.warmup + options.steps):
        begin = time.perf_counter()
        run_step(model, objective, [batch], optimizer, lr=1e-4, max_grad_norm=1.0)
        seconds.append(time.perf_counter() - begin)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"seconds": seconds[options.warmup :], "peak_mb": peak_memory_mb(), "trained": trained}


def measure(options: argparse.Namespace, system: str, method: str) -> dict[str, Any] | None:
    """In a process of its own; None: it has no such method."""
    words = ["--model", options.model, "--one", method, "--threads", str(options.threads), "--rows", str(options.rows)]
    words += ["--length", str(options.length), "--steps", str(options.steps), "--warmup", str(options.warmup)]
    script = __file__ if system == OURS else str(Path(__file__).parent / "peers" / "adapter_step.py")
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, env=environment)
    if ran.returncode != 0:
        print(f"{system} {method}: {ran.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    print(
        f"{system} {method}: {statistics.median(found['seconds']):.2f} s, {found['peak_mb']:.0f} MiB", file=sys.stderr
    )
    return found


def table(found: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
    """Markdown: the median step, as a share of our full step, and PEFT's beside it."""
    lines = ["| method | trained | a step, s | of full | peak MiB | PEFT: a step, s | peak MiB | PEFT / Oarsmith |"]
    lines.append("|---" * 8 + "|")

    def seconds(ones: list[dict[str, Any]]) -> list[float]:
        return [statistics.median(one["seconds"]) for one in ones]

    full = statistics.median(seconds(found["full"][OURS])) if found.get("full", {}).get(OURS) else None
    for method, systems in found.items():
        own, other = systems.get(OURS, []), systems.get(PEER, [])
        cells = [method, f"{own[0]['trained']:,}" if own else "", spread(seconds(own), 2) if own else "failed"]
        cells.append(f"{statistics.median(seconds(own)) / full:.2f}" if own and full else "")
        cells.append(f"{max(one['peak_mb'] for one in own):.0f}" if own else "")
        cells.append(spread(seconds(other), 2) if other else "")
        cells.append(f"{max(one['peak_mb'] for one in other):.0f}" if other else "")
        ratios = [b / a for a, b in zip(seconds(own), seconds(other), strict=False)]
        cells.append(spread(ratios, 2) if ratios else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure, or be one measurement."""
    parser = argparse.ArgumentParser(description="Steps of adapters beside PEFT's.")
    parser.add_argument("--model", required=True, help="Hugging Face directory")
    parser.add_argument("--methods", nargs="*", default=[*PEFT, "mora", "moslora", "bottleneck", "reft", *LOW_BIT])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, help="also write every measurement to this file")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(ours(options)))
        return
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for round_ in range(options.rounds):
        for method in options.methods:
            systems = [OURS, PEER] if method in PEFT else [OURS]
            for system in systems if round_ % 2 == 0 else systems[::-1]:
                if (one := measure(options, system, method)) is not None:
                    found.setdefault(method, {}).setdefault(system, []).append(one)
    facts = machine(options.threads, ["torch", "transformers", "peft"])
    print(f"{options.rows} rows of {options.length} tokens, rank 16, all linear maps\n{facts}\n\n{table(found)}")
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": facts, "measured": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
