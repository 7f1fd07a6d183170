"""Where packed weights are kept between runs, and which belong to which model. No PyTorch here."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from oarsmith import models
from oarsmith._version import __version__
from oarsmith.atomic import TEMPORARY_PREFIX
from oarsmith.compiling import cache_directory
from oarsmith.errors import CheckpointError
from oarsmith.native.arena import Arena
from oarsmith.native.packed import read_packed, write_packed
from oarsmith.native.program import Program

_SUFFIX = ".packed"
# What decides about a decoder's weights: configurations, weights of every format, adapters.
_ENDINGS = {".json", ".safetensors", ".bin", ".pdparams", ".pt", ".pth"}
# Of the files that were used last, as many as fit in this.
_MOST_BYTES = 32 << 30
# As much must stay free on the disk.
_LEAST_FREE = 2 << 30
# Nobody still writes a file that was begun so long ago.
_ABANDONED_SECONDS = 86_400


class PackedStore:
    """A directory of packed weights: ``$OARSMITH_PACKED``, or ``packed`` beside the compiled libraries."""

    def __init__(self, directory: Path | None = None) -> None:
        if directory is None:
            wanted = os.environ.get("OARSMITH_PACKED")
            directory = Path(wanted) if wanted else cache_directory() / "packed"
        self.directory = directory

    def path(self, model: Path, precision: str) -> Path:
        """Where the packed weights of a model directory belong: another one after any of its files has changed."""
        digest = hashlib.blake2b(f"{__version__} {precision} {model.resolve()}".encode(), digest_size=16)
        for file in (*_files_of(model), *_sources()):
            status = file.stat()
            digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
        return self.directory / f"{model.resolve().name[:40]}-{digest.hexdigest()}{_SUFFIX}"

    def read(self, path: Path) -> tuple[Program, Arena] | None:
        """What was kept there; None: nothing that can be used."""
        try:
            found = read_packed(path)
            os.utime(path)
        except OSError:
            return None
        except CheckpointError:
            with suppress(OSError):
                path.unlink()
            return None
        return found

    def write(self, path: Path, program: Program, arena: Arena) -> bool:
        """Keep both, unless the disk has no room to spare or cannot be written."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._make_room(arena.size)
            if shutil.disk_usage(self.directory).free < arena.size + _LEAST_FREE:
                return False
            write_packed(path, program, arena)
        except (OSError, CheckpointError):
            return False
        return True

    def _make_room(self, size: int) -> None:
        for leftover in self.directory.glob(f"{TEMPORARY_PREFIX}*"):
            if leftover.stat().st_mtime < time.time() - _ABANDONED_SECONDS:
                leftover.unlink(missing_ok=True)
        files = sorted(self.directory.glob(f"*{_SUFFIX}"), key=lambda file: file.stat().st_mtime)
        total = size + sum(file.stat().st_size for file in files)
        for file in files:
            if total <= _MOST_BYTES:
                break
            total -= file.stat().st_size
            file.unlink(missing_ok=True)


def _files_of(model: Path) -> Iterator[Path]:
    yield from (file for file in sorted(model.iterdir()) if file.suffix in _ENDINGS)


def _sources() -> Iterator[Path]:
    """The code that makes programs: while it is being worked on, its version stays the same."""
    for folder in (Path(__file__).parent, Path(models.__file__).parent):
        yield from sorted(folder.rglob("*.py"))
    yield from sorted((Path(__file__).parent / "cpp").glob("*.h"))
