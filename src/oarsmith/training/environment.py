"""What a run was computed with: versions, machine, kernels. Recorded with the run: its numbers mean little without."""

from __future__ import annotations

import os
import platform
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch

from oarsmith import kernels
from oarsmith._version import __version__

_GIB = 1024**3


def describe_environment() -> dict[str, str | int | float]:
    """Versions, processor, threads, memory and kernels of this process, as plain JSON values.

    ``memory_gib`` is the machine's physical memory, whatever limit a container sets. ``gpu`` is there only where
    PyTorch sees one.
    """
    found: dict[str, str | int | float] = {
        "recorded_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "oarsmith": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "usable_cpus": len(os.sched_getaffinity(0)) if sys.platform == "linux" else (os.cpu_count() or 1),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB, 1),
        "kernels": kernels.describe(),
    }
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        found["gpu"] = ", ".join(names)
    return found


def cpu_model() -> str:
    """The processor's name; only its architecture where the system does not tell (ARM Linux, for one)."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name" and value.strip():
                return f"{value.strip()} ({platform.machine()})"
    return platform.processor() or platform.machine()
