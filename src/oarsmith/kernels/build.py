"""Compiles the C++ kernels for this machine on first use and loads them.

The library is cached under ``$OARSMITH_CACHE`` (default ``~/.cache/oarsmith``) by a hash of the sources, the compiler,
the flags and the CPU, so another machine sharing the home directory compiles its own.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "native"
TORCH = Path(torch.__file__).parent
# No -ffast-math: NaN and infinity must survive so that a broken run is noticed. The other flags let sums vectorise.
FLAGS = [
    "-O3",
    "-march=native",
    "-std=c++17",
    "-fPIC",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-fassociative-math",
    "-freciprocal-math",
]


class BuildError(RuntimeError):
    """The kernels cannot be compiled here; the message says why."""


@dataclass(frozen=True)
class _Part:
    """What becomes one library.

    Attributes:
        with_torch: compiled against PyTorch's own C++ headers, which come with it.
    """

    name: str
    sources: tuple[Path, ...]
    with_torch: bool = False

    def compile_flags(self) -> list[str]:
        if not self.with_torch:
            return FLAGS
        return ["-O2", "-std=c++20", "-fPIC", f"-I{TORCH / 'include'}"]

    def link_flags(self) -> list[str]:
        return [f"-L{TORCH / 'lib'}", "-lc10"] if self.with_torch else _openmp()


def load_library() -> ctypes.CDLL:
    """The compiled kernels.

    Raises:
        BuildError: no compiler, a failing compiler, or a library that does not load.
    """
    return _load(_Part("kernels", tuple(sorted(SOURCES.glob("*.cpp")))))


def load_tensor_memory() -> ctypes.CDLL:
    """The allocator of large tensors (see ``tensor_memory.cpp``). Raises as :func:`load_library`."""
    return _load(_Part("memory", tuple(sorted(SOURCES.glob("with_torch/*.cpp"))), with_torch=True))


def _load(part: _Part) -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise BuildError("no C++ compiler found (install g++ to get the fast CPU kernels)")
    command = shlex.split(compiler)  # CXX may carry a launcher or flags: "ccache g++"
    try:
        path = cache_directory() / f"{part.name}-{_key(command, part)}.so"
        if path.exists():
            try:
                return ctypes.CDLL(str(path))
            except OSError:
                path.unlink()  # damaged or of another system: build it again
        _compile(command, part, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"the C++ kernels do not build with {compiler}: {error}") from error


def cache_directory() -> Path:
    """Where compiled kernels live."""
    root = os.environ.get("OARSMITH_CACHE")
    return Path(root) if root else Path.home() / ".cache" / "oarsmith"


def _compile(compiler: list[str], part: _Part, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        objects = []
        for source in part.sources:
            objects.append(str(Path(folder) / f"{source.stem}.o"))
            _run([*compiler, *part.compile_flags(), "-c", str(source), "-o", objects[-1]])
        built = Path(folder) / f"{part.name}.so"
        _run([*compiler, "-shared", *objects, "-o", str(built), *part.link_flags()])
        os.replace(built, path)  # atomic: a second process never sees half a library


def _openmp() -> list[str]:
    """Link PyTorch's own OpenMP runtime: two runtimes in a process would spin against each other."""
    for library in sorted((TORCH / "lib").glob("libgomp*.so*")):
        return [str(library), f"-Wl,-rpath,{library.parent}"]
    bundled = TORCH.parent / "torch.libs"
    for library in sorted(bundled.glob("libgomp*.so*")):
        return [str(library), f"-Wl,-rpath,{library.parent}"]
    return ["-fopenmp"]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command[:1])} failed: {done.stderr.strip()[:500]}")


def _key(compiler: list[str], part: _Part) -> str:
    digest = hashlib.sha256()
    for source in (*part.sources, *sorted(SOURCES.glob("*.h"))):
        digest.update(source.read_bytes())
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False).stdout
    for word in (version, " ".join(compiler), " ".join(part.compile_flags()), _cpu(), torch.__version__):
        digest.update(word.encode())
    return digest.hexdigest()[:16]


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
    return platform.machine() + platform.processor()
