"""The record of a run: ``log.jsonl`` (what happened, reproducible), ``timing.jsonl`` (how fast, not reproducible)."""

from __future__ import annotations

import json
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from oarsmith.atomic import atomic_write_text
from oarsmith.errors import TrainingError


class RunLog:
    """Appends one JSON object a line, each with its ``step``."""

    def __init__(self, output_dir: Path) -> None:
        self.path = output_dir / "log.jsonl"
        self.timing_path = output_dir / "timing.jsonl"

    def append(self, record: Mapping[str, Any]) -> None:
        _append(self.path, record)

    def append_timing(self, record: Mapping[str, Any]) -> None:
        _append(self.timing_path, record)

    def rewind(self, step: int) -> None:
        """Forget what came after ``step``: a resumed run writes it again, so the log has no doubles."""
        for path in (self.path, self.timing_path):
            kept = [record for record in read_log(path) if record["step"] <= step]
            atomic_write_text(path, "".join(json.dumps(record) + "\n" for record in kept))

    def records(self) -> list[dict[str, Any]]:
        return read_log(self.path)

    def timings(self) -> list[dict[str, Any]]:
        return read_log(self.timing_path)


class ReadingLog(RunLog):
    """What a process knows of the log that the main one writes: the same records, of which it writes none."""

    def __init__(self, output_dir: Path) -> None:
        super().__init__(output_dir)
        self._records: list[dict[str, Any]] = []

    def append(self, record: Mapping[str, Any]) -> None:
        self._records.append(dict(record))

    def append_timing(self, record: Mapping[str, Any]) -> None:
        """Times are the main process's."""

    def rewind(self, step: int) -> None:
        self._records = [record for record in read_log(self.path) if record["step"] <= step]

    def records(self) -> list[dict[str, Any]]:
        return self._records


def read_log(path: Path) -> list[dict[str, Any]]:
    """All whole records; a last line cut off by a kill is left out.

    Raises:
        TrainingError: a line that is no record.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    # Whatever follows the last newline is a line that a kill cut off.
    return [_record(line, f"{path}:{number}") for number, line in enumerate(lines[:-1], start=1) if line]


def _record(line: bytes, where: str) -> dict[str, Any]:
    fix = "remove the line if you can do without it"
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # also what is not UTF-8
        raise TrainingError(f"not valid JSON: {error}", where=where, fix=fix) from error
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise TrainingError("a record of a log is an object with a step", where=where, fix=fix)
    return record


def peak_memory_mb(device: torch.device | None = None) -> float:
    """Peak memory of this process in MiB: resident (Linux counts kilobytes), or for a GPU what PyTorch held there."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _append(path: Path, record: Mapping[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
