"""Products of packed weights beside what the machine could do, and beside PyTorch.

    python benchmarks/matrices.py --threads 2

Weights lie in pages of 2 MB and are rotated over more memory than a cache holds, as those of a model are. A product can
be no faster than the weights are read or than its multiplications are done; both rates are measured here, and the share
of the nearer one is printed.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from oarsmith.native.library import level, levels, load_level

FORMATS = {"f32": 0, "bf16": 1, "int8": 2, "int4": 3}
KINDS = ("fp32", "pairs of bf16", "bytes", "tiles of bf16")
SHAPES = ("960x576", "576x576", "3072x576", "576x1536", "49152x576", "4864x896", "4096x4096")
COUNTS = (1, 4, 8, 16, 32, 64, 512)
SECONDS = 0.3  # of measuring, for each number
# Of the trials it is the ninth in ten: the work of others must not make the machine look slow, nor a jump of its clock
# fast.
NINTH = 9


@dataclass(frozen=True, kw_only=True)
class Result:
    """A product's rate.

    Attributes:
        kind: of the multiplications.
        gigabytes: of weights a second.
        gigaflops: floating point operations (integer ones, too) a second, in billions.
        share: of what memory and multiplications allow.
    """

    shape: str
    weights: str
    count: int
    kind: str
    gigabytes: float
    gigaflops: float
    share: float


def typical(seconds: list[float]) -> float:
    return statistics.quantiles(seconds, n=10)[-NINTH] if len(seconds) > 1 else seconds[0]


@dataclass(frozen=True)
class Machine:
    """The library of a level, on a number of threads."""

    library: ctypes.CDLL
    threads: int

    def peaks(self) -> list[float]:
        """Operations a second of each kind; 0 where the CPU has none such."""
        self.library.native_measure_peak.restype = ctypes.c_double
        seconds = (ctypes.c_double * 200)()
        rates = []
        for kind in range(len(KINDS)):
            operations = self.library.native_measure_peak(kind, self.threads, len(seconds), seconds)
            rates.append(operations / typical(list(seconds)) if operations else 0.0)
        return rates

    def read_rate(self, memory: int, size: int) -> float:
        """Bytes a second."""
        seconds = (ctypes.c_double * max(2, round(SECONDS * 2e10 / size)))()
        self.library.native_measure_read(
            ctypes.c_void_p(memory), ctypes.c_int64(size), self.threads, len(seconds), seconds
        )
        return size / typical(list(seconds))

    @contextmanager
    def matrices(self, weights: str, rows: int, columns: int, megabytes: int) -> Iterator[tuple[int, int, int]]:
        """Address, size and number of equal matrices behind one another."""
        library, sizes = self.library, (ctypes.c_int64(rows), ctypes.c_int64(columns))
        library.native_block_bytes.restype = ctypes.c_int64
        library.native_allocate.restype = ctypes.c_void_p
        size = library.native_block_bytes(FORMATS[weights], sizes[1]) * 2 * -(-rows // 32)
        copies, handle = -(-(megabytes << 20) // size), ctypes.c_void_p()
        memory = library.native_allocate(ctypes.c_int64(size * copies), ctypes.byref(handle))
        try:
            values = np.random.default_rng(0).standard_normal((rows, columns), dtype=np.float32)
            source, to = ctypes.c_void_p(values.ctypes.data), ctypes.c_void_p(memory)
            library.native_pack(FORMATS[weights], 0, source, None, *sizes, sizes[1], to, self.threads)
            for copy in range(1, copies):
                ctypes.memmove(memory + copy * size, memory, size)
            yield memory, size, copies
        finally:
            library.native_release(handle)

    def multiply(
        self, weights: str, rows: int, columns: int, count: int, memory: int, copies: int
    ) -> tuple[float, str]:
        """Seconds of one product, and its kind."""

        def measure(copies: int, repeats: int) -> tuple[list[float], int]:
            seconds = (ctypes.c_double * repeats)()
            kind = self.library.native_measure_multiply(
                FORMATS[weights],
                ctypes.c_void_p(memory),
                ctypes.c_int64(copies),
                ctypes.c_int64(rows),
                ctypes.c_int64(columns),
                ctypes.c_int64(count),
                self.threads,
                repeats,
                seconds,
            )
            return [value / copies for value in seconds], kind

        once = measure(1, 1)[0][0]
        copies = max(1, min(copies, round(SECONDS / 5 / once)))
        seconds, kind = measure(copies, max(2, round(SECONDS / (copies * once))))
        return typical(seconds), KINDS[kind]


def measure(machine: Machine, shape: str, weights: str, counts: list[int], megabytes: int) -> list[Result]:
    rows, columns = map(int, shape.split("x"))
    peaks, results = dict(zip(KINDS, machine.peaks(), strict=True)), []
    with machine.matrices(weights, rows, columns, megabytes) as (memory, size, copies):
        for count in counts:
            before = machine.read_rate(memory, size * copies)
            seconds, kind = machine.multiply(weights, rows, columns, count, memory, copies)
            read = max(before, machine.read_rate(memory, size * copies))
            operations = 2.0 * rows * columns * count
            possible = max(size / read, operations / peaks[kind])
            results.append(
                Result(
                    shape=shape,
                    weights=weights,
                    count=count,
                    kind=kind,
                    gigabytes=size / seconds / 1e9,
                    gigaflops=operations / seconds / 1e9,
                    share=possible / seconds,
                )
            )
    return results


def measure_torch(shape: str, weights: str, counts: list[int], megabytes: int, threads: int) -> list[Result]:
    """The same with `torch.nn.functional.linear`; its share is not computed."""
    import torch

    torch.set_num_threads(threads)
    rows, columns = map(int, shape.split("x"))
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[weights]
    size = rows * columns * dtype.itemsize
    matrices = [torch.randn(rows, columns).to(dtype) for _ in range(-(-(megabytes << 20) // size))]
    results = []
    for count in counts:
        x, trials = torch.randn(count, columns).to(dtype), []
        end = time.perf_counter() + SECONDS
        while not trials or time.perf_counter() < end:
            for matrix in matrices[: max(1, len(matrices) // 4)] if trials else matrices[:1]:
                begun = time.process_time()
                torch.nn.functional.linear(x, matrix)
                trials.append((time.process_time() - begun) / threads)
            matrices = matrices[len(matrices) // 4 :] + matrices[: len(matrices) // 4]
        seconds = typical(trials)
        operations = 2.0 * rows * columns * count
        results.append(
            Result(
                shape=shape,
                weights=weights,
                count=count,
                kind="PyTorch",
                gigabytes=size / seconds / 1e9,
                gigaflops=operations / seconds / 1e9,
                share=0.0,
            )
        )
    return results


def line(results: list[Result]) -> str:
    first = results[0]
    cells = []
    for result in results:
        rate = f"{result.gigabytes:.1f} GB/s" if result.count <= 8 else f"{result.gigaflops:.0f}"
        cells.append(f"{rate}, {result.share:.0%}" if result.share else rate)
    name = f"{first.weights}, PyTorch" if first.kind == "PyTorch" else first.weights
    return f"| {first.shape} | {name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Products of packed weights beside what the machine could do.")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--level", choices=levels(), default=level(), help="instructions to use")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="OUTPUTSxINPUTS")
    parser.add_argument("--weights", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--counts", nargs="+", type=int, default=COUNTS, help="rows of activations")
    parser.add_argument("--megabytes", type=int, default=400, help="of weights, rotated")
    parser.add_argument("--torch", action="store_true", help="PyTorch beside it, in fp32 and bf16")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    machine = Machine(load_level(arguments.level), arguments.threads)
    peaks = ", ".join(f"{kind} {rate / 1e9:.0f}" for kind, rate in zip(KINDS, machine.peaks(), strict=True) if rate)
    with machine.matrices("f32", 1024, 1024, arguments.megabytes) as (memory, size, copies):
        read = machine.read_rate(memory, size * copies)
    print(f"{arguments.threads} threads, level {arguments.level}: memory {read / 1e9:.1f} GB/s; GFLOP/s of {peaks}\n")
    print(f"| outputs x inputs | weights | {' | '.join(f'{count} rows' for count in arguments.counts)} |")
    print(f"|---|---|{'---|' * len(arguments.counts)}")
    everything: list[Result] = []
    for shape in arguments.shapes:
        for weights in arguments.weights:
            results = measure(machine, shape, weights, arguments.counts, arguments.megabytes)
            print(line(results), flush=True)
            everything += results
            if arguments.torch and weights in {"f32", "bf16"}:
                results = measure_torch(shape, weights, arguments.counts, arguments.megabytes, arguments.threads)
                print(line(results), flush=True)
                everything += results
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(result) for result in everything], indent=1))


if __name__ == "__main__":
    main()
