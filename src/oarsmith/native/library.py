"""The compiled library of the step, for the instructions that this CPU has.

Each level is a library of its own: the sources look only at what the compiler's flags allow. Without a compiler a
library that was built elsewhere and lies in ``lib`` beside this file is taken; it is taken before compiling, too.
"""

from __future__ import annotations

import ctypes
import os
import platform
from functools import cache
from pathlib import Path

from oarsmith.compiling import CppLibrary, cpu_flags
from oarsmith.errors import OarsmithError

SOURCES = Path(__file__).parent / "cpp"
PREBUILT = Path(__file__).parent / "lib"
# No -ffast-math: NaN and infinity must survive so that a broken answer is noticed.
FLAGS = ("-O3", "-std=c++20", "-fPIC", "-pthread", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
_X86 = {"x86_64", "AMD64"}
_AVX512 = "avx512f avx512bw avx512cd avx512dq avx512vl avx512_vnni"
# From the best down: what the compiler is told, and what the CPU must have.
_LEVELS = {
    "amx": (
        ("-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16", "-mamx-tile", "-mamx-int8", "-mamx-bf16"),
        f"{_AVX512} avx512_bf16 amx_tile amx_int8 amx_bf16",
    ),
    "avx512bf16": (("-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16"), f"{_AVX512} avx512_bf16"),
    "avx512": (("-march=x86-64-v4", "-mavx512vnni"), _AVX512),
    "avx2vnni": (("-march=x86-64-v3", "-mavxvnni"), "avx2 fma f16c bmi1 bmi2 movbe abm avx_vnni"),
    "x86-64-v3": (("-march=x86-64-v3",), "avx2 fma f16c bmi1 bmi2 movbe abm"),
    "x86-64-v2": (("-march=x86-64-v2",), "cx16 popcnt ssse3 sse4_1 sse4_2"),
    "native": (("-march=native",), ""),  # other processors: whatever the compiler finds
}


def levels() -> list[str]:
    """The levels that this CPU can run, the best first."""
    have = set(cpu_flags().split()) if platform.machine() in _X86 else set()
    return [level for level, (_, needs) in _LEVELS.items() if needs and set(needs.split()) <= have] or ["native"]


def portable_levels() -> list[str]:
    """The levels that a package for this kind of processor can carry: those that do not depend on the CPU at hand."""
    return [level for level, (_, needs) in _LEVELS.items() if needs] if platform.machine() in _X86 else []


def level() -> str:
    """The level in use: the best, or the one that ``$OARSMITH_ISA`` names.

    Raises:
        OarsmithError: it names one that there is not, or that this CPU cannot run.
    """
    possible = levels()
    wanted = os.environ.get("OARSMITH_ISA") or possible[0]
    if wanted not in possible:
        raise OarsmithError(
            f"this CPU cannot run '{wanted}'", where="OARSMITH_ISA", fix=f"leave it out, or say {', '.join(possible)}"
        )
    return wanted


def load() -> ctypes.CDLL:
    """The library of the level in use. Raises OarsmithError as :func:`level`, and BuildError."""
    return load_level(level())


@cache
def load_level(name: str) -> ctypes.CDLL:
    """The library of a level. Raises BuildError."""
    library = _library(name)
    prebuilt = _prebuilt(library)
    return ctypes.CDLL(str(prebuilt)) if prebuilt.exists() else library.load()


def prebuild(names: list[str]) -> list[Path]:
    """Compile these levels to where :func:`load` looks first, for a package that runs without a compiler.

    Raises:
        BuildError: no compiler, or a failing one.
    """
    paths = []
    for name in names:
        library = _library(name)
        paths.append(_prebuilt(library))
        library.compile_to(paths[-1])
    return paths


def _prebuilt(library: CppLibrary) -> Path:
    return PREBUILT / f"{library.name}-{library.source_hash}.so"  # one of other sources is never taken


def flags_of(name: str) -> tuple[str, ...]:
    """What the compiler is told for a level."""
    return (*FLAGS, *_LEVELS[name][0])


def _library(name: str) -> CppLibrary:
    return CppLibrary(
        name=f"native-{name}",
        what="the C++ kernels",
        sources=tuple(sorted(SOURCES.glob("*.cpp"))),
        headers=tuple(sorted(SOURCES.glob("*.h"))),
        compile_flags=flags_of(name),
        link_flags=("-pthread",),
        depends_on=(cpu_flags(),) if name == "native" else (),
    )
