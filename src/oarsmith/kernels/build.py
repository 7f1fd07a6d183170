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
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "native"
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


def load_library() -> ctypes.CDLL:
    """The compiled kernels.

    Raises:
        BuildError: no compiler, a failing compiler, or a library that does not load.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise BuildError("no C++ compiler found (install g++ to get the fast CPU kernels)")
    command = shlex.split(compiler)  # CXX may carry a launcher or flags: "ccache g++"
    try:
        path = cache_directory() / f"kernels-{_key(command)}.so"
        if path.exists():
            try:
                return ctypes.CDLL(str(path))
            except OSError:
                path.unlink()  # damaged or of another system: build it again
        _compile(command, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"the C++ kernels do not build with {compiler}: {error}") from error


def cache_directory() -> Path:
    """Where compiled kernels live."""
    root = os.environ.get("OARSMITH_CACHE")
    return Path(root) if root else Path.home() / ".cache" / "oarsmith"


def _compile(compiler: list[str], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        objects = []
        for source in sorted(SOURCES.glob("*.cpp")):
            objects.append(str(Path(folder) / f"{source.stem}.o"))
            _run([*compiler, *FLAGS, "-c", str(source), "-o", objects[-1]])
        built = Path(folder) / "kernels.so"
        _run([*compiler, "-shared", *objects, "-o", str(built), *_openmp()])
        os.replace(built, path)  # atomic: a second process never sees half a library


def _openmp() -> list[str]:
    """Link PyTorch's own OpenMP runtime: two runtimes in a process would spin against each other."""
    for library in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        return [str(library), f"-Wl,-rpath,{library.parent}"]
    bundled = Path(torch.__file__).parent.parent / "torch.libs"
    for library in sorted(bundled.glob("libgomp*.so*")):
        return [str(library), f"-Wl,-rpath,{library.parent}"]
    return ["-fopenmp"]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command[:1])} failed: {done.stderr.strip()[:500]}")


def _key(compiler: list[str]) -> str:
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.read_bytes())
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False).stdout
    for part in (version, " ".join(compiler), " ".join(FLAGS), _cpu(), torch.__version__):
        digest.update(part.encode())
    return digest.hexdigest()[:16]


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
    return platform.machine() + platform.processor()
