"""Compiles C++ on first use and keeps the result, without importing PyTorch.

Libraries are cached under ``$OARSMITH_CACHE`` (default ``~/.cache/oarsmith``) by a hash of the sources, the compiler,
the flags and whatever else decides what comes out, so machines that share a home directory do not mix theirs up.
What only compiling needs is imported there: loading from the cache takes a few milliseconds.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path


class BuildError(RuntimeError):
    """C++ cannot be compiled here; the message says why."""


@dataclass(frozen=True, kw_only=True)
class CppLibrary:
    """What becomes one shared library.

    Attributes:
        name: of its file, with the hash.
        what: in messages, e.g. "the C++ kernels".
        headers: files that the sources include.
        depends_on: what else decides whether a compiled library is the right one, such as the CPU.
    """

    name: str
    what: str
    sources: tuple[Path, ...]
    headers: tuple[Path, ...] = ()
    compile_flags: tuple[str, ...]
    link_flags: tuple[str, ...] = ()
    depends_on: tuple[str, ...] = ()

    @cached_property
    def source_hash(self) -> str:
        """Of the sources and flags alone, whatever compiles them."""
        digest = hashlib.sha256()
        for path in (*self.sources, *self.headers):
            digest.update(path.read_bytes())
        for word in (*self.compile_flags, *self.depends_on):
            digest.update(word.encode())
        return digest.hexdigest()[:16]

    def load(self) -> ctypes.CDLL:
        """The library, compiled if it is not in the cache.

        Raises:
            BuildError: no compiler, a failing compiler, or a library that does not load.
        """
        compiler = self._compiler()
        try:
            path = cache_directory() / f"{self.name}-{self._key(compiler)}.so"
            if path.exists():
                try:
                    return ctypes.CDLL(str(path))
                except OSError:
                    path.unlink()  # damaged or of another system: build it again
            self._compile(compiler, path)
            return ctypes.CDLL(str(path))
        except OSError as error:
            raise self._failed(compiler, error) from error

    def compile_to(self, path: Path) -> None:
        """Compile to a file that is complete or absent. Raises as :meth:`load`."""
        compiler = self._compiler()
        try:
            self._compile(compiler, path)
        except OSError as error:
            raise self._failed(compiler, error) from error

    def _compiler(self) -> list[str]:
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
        if compiler is None:
            raise BuildError(f"no C++ compiler found (install g++ to get {self.what})")
        return shlex.split(compiler)  # CXX may carry a launcher or flags: "ccache g++"

    def _failed(self, compiler: list[str], error: Exception) -> BuildError:
        return BuildError(f"{self.what} do not build with {shlex.join(compiler)}: {error}")

    def _compile(self, compiler: list[str], path: Path) -> None:
        import tempfile
        from concurrent.futures import ThreadPoolExecutor

        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            objects = {source: str(Path(folder) / f"{source.stem}.o") for source in self.sources}
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                commands = (
                    [*compiler, *self.compile_flags, "-c", str(source), "-o", out] for source, out in objects.items()
                )
                list(pool.map(_run, commands))  # raises what one of them raised
            built = Path(folder) / f"{self.name}.so"
            _run([*compiler, "-shared", *objects.values(), "-o", str(built), *self.link_flags])
            os.replace(built, path)  # atomic: a second process never sees half a library

    def _key(self, compiler: list[str]) -> str:
        """The compiler counts by its files' size and time: to ask for its version takes longer than all else here."""
        found = [Path(path).stat() for path in map(shutil.which, compiler) if path is not None]
        files = [f"{file.st_size} {file.st_mtime_ns}" for file in found]
        return hashlib.sha256("\n".join((self.source_hash, *compiler, *files)).encode()).hexdigest()[:16]


def cache_directory() -> Path:
    """Where compiled libraries live."""
    root = os.environ.get("OARSMITH_CACHE")
    return Path(root) if root else Path.home() / ".cache" / "oarsmith"


def cpu_flags() -> str:
    """What this CPU can do, as the system words it: a line of words on Linux, elsewhere its name."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
    return platform.machine() + platform.processor()


def _run(command: list[str]) -> None:
    import subprocess

    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    except subprocess.TimeoutExpired as error:
        raise BuildError(str(error)) from error
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command[:1])} failed: {done.stderr.strip()[:500]}")
