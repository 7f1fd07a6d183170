"""Merging beside mergekit: seconds and memory of every method, and whether memory grows with the model.

    python benchmarks/merge.py --model SmolLM2-135M [--peer MERGEKIT/bin/mergekit-yaml] [--large 1.0]

Two models are made of the given one by adding noise to every tensor; it is their base. Every merge is a process of its
own, bf16 in and out, answers not compared (the peer does not), files in the page cache. Seconds are wall time of the
whole process, start-up included (ours is told by itself: a process that imports what a merge does): the median of
``--runs`` rounds, in which the two tools take turns at being first. No limit on threads is passed on, so both have all
cores. Memory is the largest resident set of a process in any round, and for ours, which has several, also of all of
them together (pages that they share counted once each). ``--large``: also a pair of that many gigabytes, of layers like
the model's, by ours alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

OWN: dict[str, dict[str, Any]] = {
    "linear": {"weight": 0.5},
    "slerp": {},
    "nuslerp": {"weight": 0.5},
    "multislerp": {"weight": 0.5},
    "karcher": {},
    "task_arithmetic": {"weight": 0.5},
    "ties": {"weight": 0.5, "density": 0.5},
    "dare_linear": {"weight": 0.5, "density": 0.5},
    "dare_ties": {"weight": 0.5, "density": 0.5},
    "della": {"weight": 0.5, "density": 0.5, "epsilon": 0.1},
    "breadcrumbs": {"weight": 0.5, "density": 0.6, "gamma": 0.05},
    "sce": {},
    "model_stock": {},
    "nearswap": {},
    "arcee_fusion": {},
    "ram": {},
}
SHARED = {"slerp": {"t": 0.4}, "sce": {"select_topk": 0.5}, "nearswap": {"t": 0.001}}
WITHOUT_BASE = ("linear", "multislerp", "karcher", "nuslerp")
# A command, and its words behind the recipe and the destination.
Tool = tuple[list[str], list[str]]
ONE_MODEL = ("nearswap", "arcee_fusion")


def variants(model: Path, folder: Path, layers: int | None = None) -> list[Path]:
    """The base and two models that differ from it; with more layers, copies of the given ones."""
    tensors = load_file(model / "model.safetensors")
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    if layers is not None:
        count = config["num_hidden_layers"]
        inner = {name: t for name, t in tensors.items() if name.startswith("model.layers.")}
        tensors = {name: t for name, t in tensors.items() if name not in inner}
        for layer in range(layers):
            start = f"model.layers.{layer % count}."
            tensors |= {
                name.replace(start, f"model.layers.{layer}.", 1): t
                for name, t in inner.items()
                if name.startswith(start)
            }
        config["num_hidden_layers"] = layers
    made = []
    for number, name in enumerate(("base", "one", "two")):
        target = folder / name
        target.mkdir(parents=True)
        generator = torch.Generator().manual_seed(number)
        moved = {
            key: (t.float() + number * 0.02 * t.float().std() * torch.randn(t.shape, generator=generator)).bfloat16()
            for key, t in tensors.items()
        }
        save_file(moved, target / "model.safetensors", metadata={"format": "pt"})
        (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
        for file in model.iterdir():
            if file.is_file() and file.name.startswith(("tokenizer", "special", "vocab", "merges")):
                shutil.copy(file, target / file.name)
        made.append(target)
    return made


def recipe(method: str, models: list[Path]) -> dict[str, Any]:
    """The method on two models, or on one beside its base."""
    chosen = models[1:2] if method in ONE_MODEL else models[1:]
    values: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": str(model), "parameters": OWN[method]} for model in chosen],
        "dtype": "bfloat16",
    }
    if method == "slerp":
        values["base_model"] = str(models[1])
    elif method not in WITHOUT_BASE:
        values["base_model"] = str(models[0])
    if method in SHARED:
        values["parameters"] = SHARED[method]
    return values


def resident(pid: int) -> tuple[int, int]:
    """Bytes of a process and its children: the largest alone, and all with shared pages in proportion."""
    own = [pid, *children(pid)]
    alone, together = [0], 0
    for one in own:
        try:
            lines = Path(f"/proc/{one}/smaps_rollup").read_text(encoding="ascii").splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue
        found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines[1:] if ":" in line}
        alone.append(found.get("Rss", 0))
        together += found.get("Pss", 0)
    return max(alone), together


def children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def timed(command: list[str], environment: dict[str, str]) -> tuple[float, float, float]:
    """Wall seconds, and peak megabytes of the largest process and of all."""
    begin, peak = time.perf_counter(), [0, 0]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)

    def watch() -> None:
        while process.poll() is None:
            for place, size in enumerate(resident(process.pid)):
                peak[place] = max(peak[place], size)
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, errors = process.communicate()
    seconds = time.perf_counter() - begin
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: {errors.decode()[-2000:]}")
    return seconds, peak[0] / 1e6, peak[1] / 1e6


def merged(tool: list[str], words: list[str], values: dict[str, Any], folder: Path) -> tuple[float, float, float]:
    """One merge by one tool."""
    file, out = folder / "recipe.yaml", folder / "out"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    found = timed([*tool, str(file), str(out), *words], unlimited())
    shutil.rmtree(out)
    return found


def unlimited() -> dict[str, str]:
    """The environment without limits on threads: ours has processes instead, which they would not bind."""
    return {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}


def in_turns(tools: list[Tool], rounds: int, values: dict[str, Any], folder: Path) -> list[tuple[float, float, float]]:
    """Median seconds and peak megabytes of each tool."""
    found: list[list[tuple[float, float, float]]] = [[] for _ in tools]
    for turn in range(rounds):
        for place in range(len(tools)):
            index = (turn + place) % len(tools)
            found[index].append(merged(*tools[index], values, folder))
    return [
        (statistics.median(one[0] for one in runs), max(one[1] for one in runs), max(one[2] for one in runs))
        for runs in found
    ]


def main() -> None:
    """The tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--peer", type=Path, help="mergekit-yaml of an environment of its own")
    parser.add_argument("--methods", nargs="*", default=list(OWN))
    parser.add_argument("--large", type=float, default=0.0, help="gigabytes of the large pair")
    parser.add_argument("--runs", type=int, default=3, help="rounds of which the median is told")
    options = parser.parse_args()
    tools: list[Tool] = [([sys.executable, "-m", "oarsmith", "merge"], ["--probe", "false"])]
    if options.peer is not None:
        tools.append(([str(options.peer)], []))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = variants(options.model, folder / "small")
        imports = [sys.executable, "-c", "import oarsmith.jobs.merge"]
        start = statistics.median(timed(imports, unlimited())[0] for _ in range(options.runs))
        print(f"start-up (everything imported): {start:.1f} s")
        print("| method | ours s | MB a process | MB in all | mergekit s | MB |\n| --- | --- | --- | --- | --- | --- |")
        for method in options.methods:
            (seconds, alone, together), *theirs = in_turns(tools, options.runs, recipe(method, models), folder)
            peer = f"{theirs[0][0]:.1f} | {theirs[0][1]:,.0f}" if theirs else " | "
            print(f"| {method} | {seconds:.1f} | {alone:,.0f} | {together:,.0f} | {peer} |", flush=True)
        if options.large:
            large(options, folder, tools[0])


def large(options: argparse.Namespace, folder: Path, ours: Tool) -> None:
    """The same on a pair of more layers: memory must not grow with the model."""
    size = (options.model / "model.safetensors").stat().st_size
    config = json.loads((options.model / "config.json").read_text(encoding="utf-8"))
    table = config["vocab_size"] * config["hidden_size"] * 2
    layers = int((options.large * 1e9 - table) / ((size - table) / config["num_hidden_layers"]))
    models = variants(options.model, folder / "large", layers)
    bytes_of = (models[0] / "model.safetensors").stat().st_size
    print(f"\na pair of {bytes_of / 1e9:.2f} GB ({layers} layers)\n| method | s | MB a process | MB in all |")
    print("| --- | --- | --- | --- |")
    for method in ("linear", "ties", "della", "sce"):
        ((seconds, alone, together),) = in_turns([ours], options.runs, recipe(method, models), folder)
        print(f"| {method} | {seconds:.1f} | {alone:,.0f} | {together:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
