"""Quantizing a model beside llm-compressor: KL divergence, perplexity, seconds, memory.

    python benchmarks/quantize.py --model SmolLM2-135M --calibration wiki.txt --proof test.txt [--peer llmc/bin/python]

Each is a process of its own. Ours is ``oarsmith quantize``; what a tool has written is judged by the same code
(`oarsmith.quantize.proof`): the first 6 windows of 1,024 tokens of a text that neither has seen. Embedding and head
stay as they are. The peer's seconds are those of its ``oneshot``, the model being loaded; ours hold reading the files.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from oarsmith.quantize.proof import Walked, compare
from oarsmith.quantize.read_again import rounding_of
from oarsmith.text import load_tokenizer

# Ours, and the peer's of the same kind.
CASES: dict[str, tuple[list[str], str | None]] = {
    "w8a16": (["--scheme", "w8a16"], "w8a16"),
    "w8a8 SmoothQuant 0.8": (["--scheme", "w8a8", "--smooth", "smoothquant", "--smooth_alpha", "0.8"], "w8a8"),
    "w8a8": (["--scheme", "w8a8"], None),
    "w8a8c8": (["--scheme", "w8a8c8"], None),
    "w4 g64 sym, nearest": (
        ["--algorithm", "rtn", "--scale_search", "range", "--symmetric", "true"],
        "w4-sym-rtn",
    ),
    "w4 g64 sym GPTQ": (["--algorithm", "gptq", "--symmetric", "true"], "w4-sym-gptq"),
    "w4 g64 asym, nearest": (["--algorithm", "rtn", "--scale_search", "range"], "w4-asym-rtn"),
    "w4 g64 asym GPTQ": (["--algorithm", "gptq"], "w4-asym-gptq"),
    "w4 g64 asym AWQ": (["--algorithm", "awq"], None),
    "w4 g64 asym": ([], None),
    "w4 g64 asym, rotated": (["--rotate", "true"], None),
    "fp8": (["--scheme", "fp8"], "fp8"),
    "fp8c8": (["--scheme", "fp8c8"], None),
}
NUM_WINDOWS, WINDOW, SAMPLES, LENGTH = 6, 1024, 16, 512


def ours(options: argparse.Namespace, words: list[str], out: Path) -> dict[str, float]:
    """Quantize with this project."""
    own = ["--calibration", str(options.calibration), "--proof_text", str(options.proof), "--measure_speed", "false"]
    own += ["--calibration_samples", str(SAMPLES), "--calibration_length", str(LENGTH)]
    command = [sys.executable, "-m", "oarsmith", "quantize", str(options.model), str(out), *own, *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment(options))
    report = json.loads((out / "quantization.json").read_text(encoding="utf-8"))
    return {"seconds": report["seconds"], "peak_mb": report["peak_mb"]}


def peer(options: argparse.Namespace, name: str, out: Path) -> dict[str, float]:
    """Quantize with llm-compressor."""
    script = Path(__file__).parent / "peers" / "llmcompressor_quantize.py"
    words = ["--model", str(options.model), "--text", str(options.calibration), "--out", str(out), "--one", name]
    words += ["--threads", str(options.threads), "--samples", str(SAMPLES), "--length", str(LENGTH)]
    ran = subprocess.run(
        [options.peer, str(script), *words], check=True, capture_output=True, text=True, env=environment(options)
    )
    found: dict[str, float] = json.loads(ran.stdout.strip().splitlines()[-1])
    return found


def judged(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """A model beside the original. In a process of its own: what it holds must not count as the next child's peak."""
    words = ["--model", str(options.model), "--calibration", "-", "--proof", str(options.proof), "--judge", str(folder)]
    command = [sys.executable, __file__, *words, "--threads", str(options.threads)]
    ran = subprocess.run(command, check=True, capture_output=True, text=True, env=environment(options))
    found: dict[str, float] = json.loads(ran.stdout.strip().splitlines()[-1])
    return found


def judge(options: argparse.Namespace) -> None:
    """Be that process."""
    torch.set_num_threads(options.threads)
    ids = load_tokenizer(options.model).encode(options.proof.read_text(encoding="utf-8"), add_special_tokens=False)
    windows = [ids[at : at + WINDOW] for at in range(0, NUM_WINDOWS * WINDOW, WINDOW)]
    original, other = Walked(options.model, windows), Walked(options.judge, windows, rounding_of(options.judge))
    found = compare(original, other, windows)
    print(json.dumps({"kl": found.kl, "perplexity": found.perplexity, "top1": found.top1}))


def environment(options: argparse.Namespace) -> dict[str, str]:
    """The same threads for everybody, and no hub."""
    return {**os.environ, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}


def main() -> None:
    """Measure all cases, print a table."""
    parser = argparse.ArgumentParser(description="Quantizing beside llm-compressor.")
    for name in ("model", "calibration", "proof"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--peer", help="the Python of an environment with llm-compressor")
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--judge", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="also write every number to this file")
    options = parser.parse_args()
    if options.judge is not None:
        judge(options)
        return
    rows: list[dict[str, Any]] = []
    print("| case | tool | KL, nats | perplexity | same likeliest token | seconds | peak MiB |\n" + "|---" * 7 + "|")
    for case in options.cases:
        words, other = CASES[case]
        systems = {"Oarsmith": lambda out, words=words: ours(options, words, out)}
        if options.peer and other is not None:
            systems["llm-compressor"] = lambda out, other=other: peer(options, other, out)
        for system, make in systems.items():
            folder = Path(tempfile.mkdtemp())
            try:
                cost = make(folder / "model")
                found = judged(options, folder / "model")
            finally:
                shutil.rmtree(folder)
            rows.append({"case": case, "system": system, **found, **cost})
            print(
                f"| {case} | {system} | {found['kl']:.4f} | {found['perplexity']:.2f} | {found['top1']:.1%} | "
                f"{cost['seconds']:.1f} | {cost['peak_mb']:.0f} |",
                flush=True,
            )
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
