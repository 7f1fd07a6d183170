"""Time to open a blend for pretraining: files, checks, index of the samples, first batch; without and with the cache.

    python benchmarks/open_blend.py [--files 50] [--documents 20000]

Every opening is a process of its own. "cold" has no index cache and, where the system lets us (root), none of the files
in the page cache; "warm" follows it. The time of imports is not in it. Also printed: the index of one file of a million
documents.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from oarsmith.data.corpus.indexed import IndexedBuilder

OPEN = """
import json, sys, time
from pathlib import Path
from oarsmith.data.corpus.loader import CorpusLoader
from oarsmith.data.corpus.parts import Corpus
folder, seq_len, samples, rows = Path(sys.argv[1]), *map(int, sys.argv[2:])
blend = " ".join(f"{1 + n % 7} {path.with_suffix('')}" for n, path in enumerate(sorted(folder.glob("*.idx"))))
start = time.perf_counter()
corpus = Corpus(blend, shares=(0.949, 0.05, 0.001), seq_len=seq_len)
opened = time.perf_counter()
part = corpus.draw("train", samples, seed=42)
evaluation = corpus.draw("valid", 10 * rows, seed=0)
drawn = time.perf_counter()
batch = CorpusLoader(part, rows_per_batch=rows, isolate_documents=True).batch_at(0, 0)
end = time.perf_counter()
print(json.dumps({"open": opened - start, "index": drawn - opened, "batch": end - drawn, "total": end - start}))
"""
ONE = """
import json, time
import numpy as np
from oarsmith.data.corpus.samples import build_index
lengths = np.random.default_rng(0).integers(0, 2000, 1_000_000).astype(np.int32)
start = time.perf_counter()
index = build_index(lengths, range(len(lengths)), seq_len=1024, num_epochs=1, seed=0, purpose="train")
print(json.dumps({"seconds": time.perf_counter() - start, "samples": len(index)}))
"""


def measure(script: str, *arguments: object) -> dict[str, float]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout)


def make(folder: Path, num_files: int, num_documents: int) -> int:
    rng = np.random.default_rng(0)
    num_tokens = 0
    for number in range(num_files):
        sizes = rng.integers(1, 400, num_documents).astype(np.int32)
        with IndexedBuilder(folder / f"part-{number:03d}", np.uint16) as builder:
            builder.add_documents(rng.integers(0, 50_000, sizes.sum(), dtype=np.uint16), sizes)
        num_tokens += int(sizes.sum())
    return num_tokens


def drop_page_cache() -> bool:
    try:
        subprocess.run(["sync"], check=True)
        Path("/proc/sys/vm/drop_caches").write_text("1\n")
    except OSError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=50)
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--seq_len", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=160_000)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        num_tokens = make(folder, options.files, options.documents)
        print(f"{options.files} files x {options.documents:,} documents, {num_tokens:,} tokens in all")
        print(f"{options.samples:,} samples of {options.seq_len:,}; seconds, best of {options.rounds}")
        runs: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
        for _ in range(options.rounds):
            shutil.rmtree(folder / "index-cache", ignore_errors=True)
            dropped = drop_page_cache()
            for state in runs:
                runs[state].append(measure(OPEN, folder, options.seq_len, options.samples, options.rows))
        print(f"{'':6}{'open':>9}{'index':>9}{'batch':>9}{'total':>9}")
        for state, found in runs.items():
            best = min(found, key=lambda run: run["total"])
            print(f"{state:6}" + "".join(f"{best[key]:9.3f}" for key in ("open", "index", "batch", "total")))
        print("page cache dropped before cold: " + ("yes" if dropped else "no, only the index cache"))
    one = measure(ONE)
    print(f"index of one file of 1,000,000 documents: {one['seconds']:.3f} s ({one['samples']:,.0f} samples)")


if __name__ == "__main__":
    main()
