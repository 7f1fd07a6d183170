"""``oarsmith bench``: how fast a model answers, and how fast other engines answer the same requests."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from oarsmith.atomic import atomic_write_bytes, atomic_write_text
from oarsmith.checkpoint.config_file import read_config
from oarsmith.config.bench import BenchConfig
from oarsmith.config.resolved import Resolved
from oarsmith.errors import ConfigError, OarsmithError
from oarsmith.jobs.bench_report import disturbed, draw, numbers_of, same_tokens, table
from oarsmith.jobs.bench_requests import BenchRequest, bench_requests
from oarsmith.jobs.bench_systems import PACKAGES, Task
from oarsmith.jobs.console import make_console
from oarsmith.loading import pick_device
from oarsmith.model_path import resolve
from oarsmith.models import families
from oarsmith.text import load_tokenizer
from oarsmith.text.choose import with_named_template
from oarsmith.training.environment import describe_environment
from oarsmith.training.precision import has_fast_bf16

OURS = "oarsmith"


def run(resolved: Resolved[BenchConfig]) -> int:
    """The command."""
    config, console = resolved.config, make_console()
    for peer in config.compare:
        _need(peer, config)
    where = resolve(config.model_name_or_path, config.adapter)
    tokenizer = load_tokenizer(config.tokenizer_name_or_path or where.base)
    _, spec = families.build_spec(read_config(where.base))
    requests = bench_requests(
        config, with_named_template(tokenizer, config.chat_template), spec.vocab_size, spec.max_positions
    )
    environment = {**describe_environment(), "load_before": os.getloadavg()[0]}
    task = Task(
        system=OURS,
        config=config.model_dump(mode="json"),
        model=str(where.base),
        dtype=_dtype(config, where.base),
        requests=[(request.ids, request.output_tokens) for request in requests],
    )
    with _peer_models(config, where.base, task.dtype) as models:
        tasks = [replace(task, system=name, model=models.get(name, task.model)) for name in (OURS, *config.compare)]
        measured = _measure_all(tasks, config.repetitions, console)
    _report(config, requests, environment, measured, console)
    return 0


def _need(peer: str, config: BenchConfig) -> None:
    module, package = PACKAGES[peer]
    if importlib.util.find_spec(module) is None:
        raise ConfigError(
            f"compare {peer} needs the package '{package}', which is not installed",
            where="compare",
            fix=f"pip install {package}",
        )
    if config.adapter is not None:
        raise ConfigError(
            f"{peer} is given the model without its adapter: it would answer something else",
            where="compare",
            fix="merge the adapter first: oarsmith merge-adapter",
        )


def _dtype(config: BenchConfig, model: Path) -> str:
    """What peers compute in: what is asked for, or what the engine takes by itself."""
    if config.dtype != "auto":
        return config.dtype
    content = read_config(model)
    stored = {"bfloat16": "bf16", "float16": "fp16"}.get(str(content.get("torch_dtype", content.get("dtype"))), "fp32")
    device = pick_device(config.device)
    if device.type == "cpu" and (stored == "fp16" or not has_fast_bf16(device)):
        return "fp32"
    return stored


@contextmanager
def _peer_models(config: BenchConfig, model: Path, dtype: str) -> Iterator[dict[str, str]]:
    """The model as each of the peers reads it that do not read directories of Hugging Face."""
    from oarsmith.checkpoint.gguf.write import write_gguf

    # openvino-genai reads no other unquantized type.
    types = {"llama.cpp": {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}[dtype], "openvino-genai": "f16"}
    found = {"openvino-genai": config.openvino_model}
    with tempfile.TemporaryDirectory(prefix="oarsmith-bench-") as folder:
        for peer in set(types) & set(config.compare):
            if found.get(peer) is None and config.gguf_file is None:
                file = Path(folder) / f"{types[peer]}.gguf"
                if not file.exists():
                    write_gguf(model, file, type=types[peer])
                found[peer] = str(file)
        yield {peer: found.get(peer) or config.gguf_file or "" for peer in types}


def _measure_all(tasks: list[Task], repetitions: int, console: Console) -> dict[str, list[dict[str, Any]]]:
    """The measurements of each engine. Engines take turns, and the order is turned around from round to round."""
    measured: dict[str, list[dict[str, Any]]] = {task.system: [] for task in tasks}
    for repetition in range(repetitions):
        for task in tasks if repetition % 2 == 0 else tasks[::-1]:
            found = _measure(task)
            measured[task.system].append(found)
            numbers = numbers_of(found)
            console.print(
                f"{repetition + 1}/{repetitions} {task.system}: first token {numbers['first_token_ms']:.1f} ms, "
                f"then {numbers['decode_tokens_per_s']:.1f} tokens/s alone, "
                f"{numbers['output_tokens_per_s']:.1f} tokens/s together, {numbers['peak_mb']:,.0f} MiB",
                style="dim",
            )
    return measured


def _measure(task: Task) -> dict[str, Any]:
    """One measurement in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="oarsmith-bench-") as name:
        task_file, result_file, output = (Path(name) / part for part in ("task.json", "result.json", "output.txt"))
        task_file.write_text(json.dumps(asdict(replace(task, started=time.time()))), encoding="utf-8")
        words = [sys.executable, "-m", "oarsmith.jobs.bench_worker", str(task_file), str(result_file)]
        with output.open("wb") as printed:
            status = subprocess.run(words, stdout=printed, stderr=subprocess.STDOUT, check=False).returncode
        if status != 0:
            lines = output.read_text(errors="replace").strip().splitlines() or ["nothing was printed"]
            raise OarsmithError(
                f"{task.system} could not be measured: {lines[-1]}",
                where=f"exit status {status}" if status > 0 else f"ended by {signal.Signals(-status).name}",
                fix="its last lines:\n         " + "\n         ".join(lines[-8:]),
            )
        found: dict[str, Any] = json.loads(result_file.read_text(encoding="utf-8"))
        return found


def _report(
    config: BenchConfig,
    requests: list[BenchRequest],
    environment: dict[str, Any],
    measured: dict[str, list[dict[str, Any]]],
    console: Console,
) -> None:
    found = {system: [numbers_of(one) for one in ones] for system, ones in measured.items()}
    same: dict[str, float] = {peer: same_tokens(measured[OURS][0], measured[peer][0]) for peer in config.compare}
    versions = {system: ones[0]["versions"] for system, ones in measured.items()}
    asked = _asked(config, requests)
    console.print(f"\n{table(found, same)}\n")
    console.print(f"{asked}; median of {config.repetitions} (least-most)")
    console.print(f"{environment['cpu']}, {environment['usable_cpus']} CPUs, {environment['memory_gib']} GiB")
    for system, facts in versions.items():
        console.print(f"{system}: {', '.join(f'{name} {value}' for name, value in facts.items())}")
    if warning := disturbed(found):
        console.print(f"note: {warning}")
    folder = Path(config.output_dir)
    content = {
        "config": config.model_dump(mode="json"),
        "environment": environment,
        "versions": versions,
        "requests": {
            "prompt_tokens": [len(r.ids) for r in requests],
            "output_tokens": [r.output_tokens for r in requests],
        },
        "numbers": found,
        "same_tokens": same,
        "measurements": measured,
    }
    atomic_write_text(folder / "bench.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    model = Path(config.model_name_or_path).resolve().name
    atomic_write_bytes(folder / "bench.png", draw(found, f"{model}: {asked}"))
    console.print(f"written: {folder / 'bench.json'}, {folder / 'bench.png'}")


def _asked(config: BenchConfig, requests: list[BenchRequest]) -> str:
    """The requests in words."""
    inputs, outputs = {len(request.ids) for request in requests}, {request.output_tokens for request in requests}
    lengths = [f"{min(n):,}" if len(n) == 1 else f"{min(n):,}-{max(n):,}" for n in (inputs, outputs)]
    alone = min(config.single_requests, len(requests))
    return (
        f"{len(requests)} requests of {lengths[0]} + {lengths[1]} tokens, {config.concurrency} at a time; "
        f"{alone} of them alone"
    )
