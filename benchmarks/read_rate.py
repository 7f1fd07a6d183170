"""How fast the cores read memory in 2 MB pages: what bounds the speed at which one answer is written.

    python benchmarks/read_rate.py --megabytes 95 --threads 2

The block is as large as the weights that a token needs: caches may hold a part of them, and it is read faster then.
"""

from __future__ import annotations

import argparse
import ctypes
import os
from pathlib import Path

from oarsmith.compiling import CppLibrary

# Short beside what a busy neighbour or a jump of the clock lasts, so that one of them sees neither.
NUM_TRIALS, BYTES_PER_TRIAL = 8, 6 * 10**9


def read_rate(num_bytes: int, threads: int) -> float:
    """Bytes/s of the best of many passes over a block of this size."""
    library = CppLibrary(
        name="read-rate",
        what="the measure of the memory",
        sources=(Path(__file__).with_suffix(".cpp"),),
        compile_flags=("-O3", "-std=c++20", "-march=native", "-fPIC", "-pthread"),
        link_flags=("-pthread",),
    ).load()
    library.read_rate.restype = ctypes.c_double
    passes = max(BYTES_PER_TRIAL // num_bytes, 3)
    return max(library.read_rate(ctypes.c_int64(num_bytes), threads, passes) for _ in range(NUM_TRIALS))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Read rate of memory in 2 MB pages, GB/s.")
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    print(f"{read_rate(options.megabytes * 10**6, options.threads) / 1e9:.1f} GB/s")
