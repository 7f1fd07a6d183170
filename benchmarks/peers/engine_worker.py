"""One measurement of one engine for `benchmarks/engine.py`: ``python engine_worker.py TASK RESULT``, both JSON files.

It runs in the engine's own Python, with Oarsmith's sources in PYTHONPATH; it needs nothing but the standard library.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine_systems import SYSTEMS

from oarsmith.jobs.bench_systems import Answer, Request, System, Task
from oarsmith.jobs.bench_worker import peak_mb

WARM_TOKENS = 8
WARM_PROMPT = 64  # of the part batch
# No further repetition is begun after so long, except that each kind of request is answered once.
MOST_SECONDS = 20.0


def measure(part: str, task: Task) -> dict[str, Any]:
    """The answers of a part: the only one (`cold`), one after another (`alone`), or all at once (`batch`)."""
    system = SYSTEMS[task.system](task)
    requests = [(list(ids), size) for ids, size in task.requests]
    if part == "cold":
        (first,) = system.answer(requests, 1)
        return {"cold_s": time.time() - task.started - (time.perf_counter() - first.times[0])}
    before = scheduled()
    answers = one_by_one(system, requests) if part == "alone" else together(system, requests)
    ran, waited = (now - then for now, then in zip(scheduled(), before, strict=True))
    return {
        "answers": answers,
        "peak_mb": peak_mb(),
        "waited": waited / max(ran + waited, 1),
        "versions": system.versions(),
    }


def one_by_one(system: System, requests: Sequence[Request]) -> list[dict[str, Any]]:
    kinds = {len(ids): (ids, min(size, WARM_TOKENS)) for ids, size in requests}
    for request in kinds.values():
        system.answer([request], 1)
    start, answers = time.perf_counter(), list[dict[str, Any]]()
    for number, request in enumerate(requests):
        if number >= len(kinds) and time.perf_counter() - start > MOST_SECONDS:
            break
        answers += plain([request], system.answer([request], 1))
    return answers


def together(system: System, requests: Sequence[Request]) -> list[dict[str, Any]]:
    system.answer([(ids[:WARM_PROMPT], min(size, WARM_TOKENS)) for ids, size in requests], len(requests))
    return plain(requests, system.answer(requests, len(requests)))


def plain(requests: Sequence[Request], answers: Sequence[Answer]) -> list[dict[str, Any]]:
    for (_, size), answer in zip(requests, answers, strict=True):
        if len(answer.times) != size:
            raise RuntimeError(f"{len(answer.times)} tokens came instead of {size}")
    return [
        {"prompt_tokens": len(ids), "begin": answer.begin, "times": answer.times}
        for (ids, _), answer in zip(requests, answers, strict=True)
    ]


def scheduled() -> tuple[int, int]:
    """For how long threads of this process ran, and for how long they waited for a processor, ns."""
    found = [path.read_text().split() for path in Path("/proc/self/task").glob("*/schedstat")]
    return sum(int(numbers[0]) for numbers in found), sum(int(numbers[1]) for numbers in found)


def main(task_file: str, result_file: str) -> None:
    content = json.loads(Path(task_file).read_text(encoding="utf-8"))
    found = measure(content.pop("part"), Task(**content))
    Path(result_file).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
