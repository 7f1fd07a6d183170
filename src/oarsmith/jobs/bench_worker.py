"""One measurement of one engine, in a process of its own: ``python -m oarsmith.jobs.bench_worker TASK RESULT``."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from oarsmith.jobs.bench_systems import SYSTEMS, Answer, Request, System, Task

# Tokens of an answer in the rounds before the measurement: enough to see every shape.
_WARM_TOKENS = 8


def measure(task: Task) -> dict[str, Any]:
    """Everything that is measured in one process, as plain values.

    ``load_s``, ``cold_start_s``: from the start of the process until the model could be asked, and until the first
    token of a first answer. ``alone``, ``together``: the answers with their times, and ``waited``: which share of the
    time in which its threads could have run a processor did something else. ``peak_mb``: most memory of the process,
    MiB.
    """
    system = SYSTEMS[task.system](task)
    load_s = time.time() - task.started
    requests, config = task.requests, task.config
    alone, concurrency = requests[: config["single_requests"]], config["concurrency"]
    (first,) = system.answer([(alone[0][0], 2)], 1)
    cold_start_s = time.time() - task.started - (time.perf_counter() - first.times[0])
    for _ in range(config["warmup"]):
        system.answer(_short(alone), 1)
        system.answer(_short(requests[:concurrency]), concurrency)
    return {
        "load_s": load_s,
        "cold_start_s": cold_start_s,
        "alone": _phase(system, alone, 1),
        "together": _phase(system, requests, concurrency),
        "peak_mb": peak_mb(),
        "versions": system.versions(),
    }


def _short(requests: Sequence[Request]) -> list[Request]:
    return [(ids, min(size, _WARM_TOKENS)) for ids, size in requests]


def _phase(system: System, requests: Sequence[Request], concurrency: int) -> dict[str, Any]:
    ran_before, waited_before = _scheduled()
    answers = system.answer(requests, concurrency)
    ran, waited = _scheduled()
    for (_, size), answer in zip(requests, answers, strict=True):
        assert len(answer.ids) == len(answer.times) == size, (len(answer.ids), size)
    ran, waited = ran - ran_before, waited - waited_before
    return {
        "answers": [_plain(len(ids), answer) for (ids, _), answer in zip(requests, answers, strict=True)],
        "waited": waited / max(ran + waited, 1),
    }


def _plain(num_prompt_tokens: int, answer: Answer) -> dict[str, Any]:
    return {"prompt_tokens": num_prompt_tokens, "begin": answer.begin, "times": answer.times, "ids": answer.ids}


def _scheduled() -> tuple[int, int]:
    """For how long threads of this process ran and waited for a processor, ns; zeros where that is not told."""
    found = [path.read_text().split() for path in Path("/proc/self/task").glob("*/schedstat")]
    return sum(int(numbers[0]) for numbers in found), sum(int(numbers[1]) for numbers in found)


def peak_mb() -> float:
    """The most memory that this process had, MiB; on a GPU what PyTorch had there is added."""
    peak = 0.0
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: what the parent had when it started this process would count.
        peak = next(int(x.split()[1]) for x in status.read_text().splitlines() if x.startswith("VmHWM")) / 1024
    else:
        import resource

        # Bytes, on the systems without /proc.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        peak += torch.cuda.max_memory_allocated() / 2**20
    return peak


def main(task_file: str, result_file: str) -> None:
    """Do the task of a file, and write what was measured."""
    task = Task(**json.loads(Path(task_file).read_text(encoding="utf-8")))
    Path(result_file).write_text(json.dumps(measure(task)), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
