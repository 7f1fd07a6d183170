"""One measurement: a process of its own, and a JSON-lines file in which it notes every training step it has finished.

What is measured from outside (start, peak memory, CPU time) is thereby measured in the same way for every trainer.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# Between looks at the file: short beside a step, and no load worth mentioning.
POLL_SECONDS = 0.02


class FailedRunError(RuntimeError):
    """The process ended with an error; the message holds the end of its output."""


@dataclass(frozen=True, kw_only=True)
class Watched:
    """What was seen of a process.

    Attributes:
        records: the lines of its file.
        first_step_s: seconds from its start until it had finished step 1: imports, data, model and that step.
        peak_mb: largest resident memory of the process, MiB.
        cpu_share: CPU time it got while it did the steps after the first, divided by what `threads` cores offered. Much
            below 1 means that something else was running.
    """

    records: list[dict[str, float]]
    first_step_s: float
    peak_mb: float
    cpu_share: float


def watch(
    command: Sequence[str], record_file: Path, num_steps: int, *, threads: int, output: Path, caches: Path | None = None
) -> Watched:
    """Run a command until it ends.

    Args:
        caches: where it keeps what it compiles: an empty folder makes it a first start. Not given: its usual place.

    Raises:
        FailedRunError: it failed, or noted fewer than `num_steps` steps.
    """
    with output.open("w") as log:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment(threads, caches))
        marks: dict[int, tuple[float, float]] = {}
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            done = _num_lines(record_file)
            if not pid and done and done not in marks:
                marks[done] = time.perf_counter() - start, _cpu_seconds(process.pid)
            if pid:
                break
            time.sleep(POLL_SECONDS)
        process.returncode = os.waitstatus_to_exitcode(status)
    records = _read(record_file)
    if process.returncode != 0 or len(records) < num_steps:
        raise FailedRunError(
            f"exit status {process.returncode}, {len(records)} of {num_steps} steps: {' '.join(command)}\n"
            + output.read_text(errors="replace")[-3000:]
        )
    first, last = min(marks), max(marks)
    wall, cpu = (b - a for a, b in zip(marks[first], marks[last], strict=True))
    return Watched(
        records=records,
        first_step_s=marks[first][0],
        peak_mb=usage.ru_maxrss / 1024,
        cpu_share=cpu / (wall * threads) if wall > 0 else 0.0,
    )


def environment(threads: int, caches: Path | None = None) -> Mapping[str, str]:
    """Both sides get the same threads, the same thread waiting (Oarsmith sets it for itself) and no network."""
    shared = {"OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": "20000"}
    if caches is not None:
        shared |= {"OARSMITH_CACHE": str(caches / "oarsmith"), "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor")}
    return {**os.environ, **shared, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def _num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def _read(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _cpu_seconds(pid: int) -> float:
    """User and system time of a process so far (proc(5), fields 14 and 15 of stat)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
