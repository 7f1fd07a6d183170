"""Training processes that start fast, and what is left of them: killed at a moment, looked at, compared.

They are forked from a server that has imported everything and computed nothing, so a start costs no seconds of imports.
Each is a process of its own that runs the whole command; SIGKILL ends it as it ends any other.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from oarsmith import cli

# And what commands import late: pictures of the report take a second, PyTorch's recomputing takes four.
_IMPORTS = (
    "pytest",
    "oarsmith.jobs.generate",
    "oarsmith.jobs.pretrain",
    "oarsmith.jobs.sft",
    "matplotlib.figure",
    "torch._dynamo",
)
_MAX_SECONDS = 240

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(list(_IMPORTS))
# Starting a process also looks at those that other threads wait for, and an exit status can be read only once.
_lock = threading.Lock()


class Run:
    """``oarsmith`` with these words in a process of its own; what it prints goes into a file."""

    def __init__(self, words: Sequence[str], printed: Path) -> None:
        printed.parent.mkdir(parents=True, exist_ok=True)
        self.printed = printed
        self._from = printed.stat().st_size if printed.exists() else 0
        self._process: ForkServerProcess = _server.Process(target=_main, args=(list(words), str(printed)))
        with _lock:
            self._process.start()

    def output(self) -> str:
        """What this process has printed so far."""
        return self.printed.read_bytes()[self._from :].decode() if self.printed.exists() else ""

    def status(self) -> int | None:
        """The exit status (negative: of a signal); None while it runs."""
        with _lock:
            return self._process.exitcode

    def wait_until(self, seen: Callable[[], bool]) -> None:
        """Until something shows on the disk, or the process has ended."""
        begin = time.monotonic()
        while self.status() is None and not seen():
            assert time.monotonic() - begin < _MAX_SECONDS, self.output()
            time.sleep(0.0005)

    def end(self, by: signal.Signals | None = None) -> int:
        """The exit status, after sending a signal if one is given."""
        if by is not None and self.status() is None:
            assert self._process.pid is not None
            os.kill(self._process.pid, by)
        begin = time.monotonic()
        while (status := self.status()) is None:
            if time.monotonic() - begin > _MAX_SECONDS:
                self._process.kill()
                raise AssertionError(f"did not end: {self.output()}")
            time.sleep(0.002)
        return status


def _main(words: list[str], printed: str) -> None:
    descriptor = os.open(printed, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.exit(cli.main(words))


def finish(words: Sequence[str], folder: Path) -> str:
    """Run to the end; what was printed."""
    run = Run(words, printed_of(folder))
    assert run.end() == 0, run.output()
    return run.output()


def printed_of(folder: Path) -> Path:
    """Beside the run folder: what is inside belongs to the run."""
    return folder.with_name(f"{folder.name}.txt")


def kill(words: Sequence[str], folder: Path, chance: random.Random, *, most_lines: int) -> str:
    """Start, and kill after 1 to ``most_lines`` new lines of the log: as soon as a save is seen, or while none is.

    Says where it hit.
    """
    before, saved, wanted = inode(folder / "log.jsonl"), num_lines(folder), chance.randint(1, most_lines)
    in_save, begin = chance.random() < 0.5, -1

    def now() -> bool:
        nonlocal begin
        # The log is rewound to the checkpoint first, which makes it another file.
        if begin < 0 and inode(folder / "log.jsonl") != before:
            begin = min(num_lines(folder), saved)
        return 0 <= begin <= num_lines(folder) - wanted and in_save == is_saving(folder)

    run = Run(words, printed_of(folder))
    run.wait_until(now)
    time.sleep(chance.uniform(0, 0.004))
    saving = is_saving(folder)
    assert run.end(signal.SIGKILL) == -signal.SIGKILL, f"ended before it could be killed: {run.output()}"
    check_checkpoints(folder)
    return "in a save" if saving else "between saves"


def inode(path: Path) -> int | None:
    """Which file lies under this name."""
    return path.stat().st_ino if path.exists() else None


def num_lines(folder: Path) -> int:
    """Lines of the log."""
    log = folder / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def is_saving(folder: Path) -> bool:
    """Whether a checkpoint is half written."""
    return any(folder.glob(".tmp-checkpoint-*"))


def steps_saved(folder: Path) -> list[int]:
    """Steps of the checkpoints, ascending."""
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*"))


def check_checkpoints(folder: Path) -> None:
    """Every checkpoint with a name is whole: the files of its manifest, no others, each with its hash."""
    for checkpoint in folder.glob("checkpoint-*"):
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        files = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
        assert files == {*manifest, "manifest.json"}
        for name, entry in manifest.items():
            data = (checkpoint / name).read_bytes()
            assert len(data) == entry["bytes"]
            assert hashlib.sha256(data).hexdigest() == entry["sha256"]


def results(folder: Path) -> dict[str, bytes]:
    """Weights, averages, optimizer state, trainer state, steps kept as odd, and log: all that training computes."""
    names = ["log.jsonl"]
    for kind in ("model", "model-ema", "adapter", "checkpoint-*", "spike-step-*"):
        for inside in folder.glob(kind):
            names += [str(path.relative_to(folder)) for path in inside.rglob("*.safetensors")]
            names += [str(path.relative_to(folder)) for path in inside.glob("trainer/*.json")]
    return {name: (folder / name).read_bytes() for name in names}


def same(whole: Path, other: Path, *, checkpoints: bool = True) -> None:
    """Bit for bit, and nothing left half written. Without ``checkpoints``: where they lie may differ, the last counts.

    Their weights, states and place are those of the last step.
    """
    expected, found = results(whole), results(other)
    if not checkpoints:
        last = f"checkpoint-{steps_saved(whole)[-1]}/"
        kept = [name for name in expected.keys() | found.keys() if not name.startswith("checkpoint-") or last in name]
        expected, found = ({name: r[name] for name in kept if name in r} for r in (expected, found))
    assert any(name.endswith("trainer/optimizer.safetensors") for name in expected)
    different = [name for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]
    assert not different, different
    assert not list(other.glob(".tmp-*"))
