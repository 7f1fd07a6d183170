"""The libraries of C++ kernels: which sources, which flags."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from oarsmith.compiling import CppLibrary, cpu_flags

SOURCES = Path(__file__).parent / "native"
TORCH = Path(torch.__file__).parent
# No -ffast-math: NaN and infinity must survive so that a broken run is noticed. The other flags let sums vectorise.
FLAGS = (
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
)


def load_library() -> ctypes.CDLL:
    """The compiled kernels. Raises BuildError."""
    return CppLibrary(
        name="kernels",
        what="the C++ kernels",
        sources=tuple(sorted(SOURCES.glob("*.cpp"))),
        headers=tuple(sorted(SOURCES.glob("*.h"))),
        compile_flags=FLAGS,
        link_flags=_openmp(),
        depends_on=(cpu_flags(), torch.__version__),
    ).load()


def load_tensor_memory() -> ctypes.CDLL:
    """The allocator of large tensors (see ``tensor_memory.cpp``), compiled against PyTorch's own C++ headers, which
    come with it. Raises BuildError."""
    return CppLibrary(
        name="memory",
        what="the C++ kernels",
        sources=tuple(sorted(SOURCES.glob("with_torch/*.cpp"))),
        compile_flags=("-O2", "-std=c++20", "-fPIC", f"-I{TORCH / 'include'}"),
        link_flags=(f"-L{TORCH / 'lib'}", "-lc10"),
        depends_on=(cpu_flags(), torch.__version__),
    ).load()


def _openmp() -> tuple[str, ...]:
    """Link PyTorch's own OpenMP runtime: two runtimes in a process would spin against each other."""
    for library in sorted((TORCH / "lib").glob("libgomp*.so*")):
        return (str(library), f"-Wl,-rpath,{library.parent}")
    bundled = TORCH.parent / "torch.libs"
    for library in sorted(bundled.glob("libgomp*.so*")):
        return (str(library), f"-Wl,-rpath,{library.parent}")
    return ("-fopenmp",)
