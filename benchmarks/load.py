"""Time and memory to load a model, beside transformers' ``from_pretrained``, in one run.

    python benchmarks/load.py --model DIR

Every load is a process of its own, the two sides take turns, and the order turns around from round to round. "load" is
the call alone, "process" everything from the interpreter's start to a model that has answered one token: transformers
maps the file and reads a weight when it is first used, so the first answer belongs to the load. Peak memory is the
process's largest resident set, up to that answer.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

PROBES = {
    "oarsmith": """
import oarsmith
from oarsmith.loading import load_model
t1 = time.perf_counter()
model = load_model(path, dtype=dtype)
t2 = time.perf_counter()
with torch.inference_mode():
    model(torch.tensor([[1]]))
""",
    "transformers": """
import transformers
from transformers import AutoModelForCausalLM
t1 = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(path, dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])
t2 = time.perf_counter()
with torch.inference_mode():
    model(torch.tensor([[1]]))
""",
}
FRAME = """
import json, resource, sys, time
start = time.perf_counter()
path, dtype = sys.argv[1:]
import torch
{probe}
end = time.perf_counter()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({{"import": t1 - start, "load": t2 - t1, "process": end - start, "peak_mb": peak}}))
"""


def measure(system: str, model: Path, dtype: str) -> dict[str, float]:
    script = FRAME.format(probe=PROBES[system])
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", script, str(model), dtype], capture_output=True, text=True, check=True, timeout=600
    )
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return {**found, "wall": time.perf_counter() - begun}


def main() -> None:
    parser = argparse.ArgumentParser(description="Loading time and memory beside transformers.")
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face directory that both sides read")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    options = parser.parse_args()
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in PROBES}
    for turn in range(options.rounds + 1):
        for name in list(PROBES)[:: 1 if turn % 2 else -1]:
            found = measure(name, options.model, options.dtype)
            if turn:  # the first round fills the file cache
                runs[name].append(found)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers"))
    print(f"{options.model.name}, {options.dtype}, {options.rounds} rounds; {platform.machine()}, {versions}")
    print(f"{'':14}{'import s':>10}{'load s':>10}{'process s':>11}{'peak MB':>10}")
    middle = {name: {key: statistics.median(r[key] for r in rows) for key in rows[0]} for name, rows in runs.items()}
    for name, row in middle.items():
        print(f"{name:14}{row['import']:10.2f}{row['load']:10.3f}{row['process']:11.2f}{row['peak_mb']:10.0f}")
    pairs = list(zip(*runs.values(), strict=True))
    ratios = {key: statistics.median(ours[key] / theirs[key] for ours, theirs in pairs) for key in pairs[0][0]}
    shown = "".join(f"{ratios[k]:{w}.2f}" for k, w in {"import": 10, "load": 10, "process": 11, "peak_mb": 10}.items())
    print(f"{'ratio':14}{shown}")


if __name__ == "__main__":
    main()
