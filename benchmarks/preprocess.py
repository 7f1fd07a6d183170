"""Text to token files: ``oarsmith preprocess`` beside Megatron-LM's ``preprocess_data``, on this machine, in one run.

    python benchmarks/preprocess.py --tokenizer MODEL --data corpus.jsonl

Same file, same tokenizer, same number of worker processes; both write a .bin/.idx pair, which must be the same bytes.
Every measurement is a process of its own, from its start to its end. The two take turns, the order turned around from
round to round, and ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import filecmp
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import oarsmith

PEER = Path(__file__).parent / "peers" / "megatron_preprocess.py"
OURS, THEIRS = "oarsmith", "megatron"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One process.

    Attributes:
        seconds: wall time from its start to its end.
        cpu_seconds: of the process and its workers.
        encoding_seconds: as it says itself, without imports and loading the tokenizer in the first process.
    """

    system: str
    round: int
    seconds: float
    cpu_seconds: float
    encoding_seconds: float


def options_from_command_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="directory with a tokenizer")
    parser.add_argument("--data", required=True, help="a .jsonl file with the field 'text'")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer_python", default=sys.executable, help="a Python with transformers (and megatron-core)")
    parser.add_argument("--json", help="also write every measurement to this file")
    return parser.parse_args()


def measure(options: argparse.Namespace, system: str, round_: int, folder: Path) -> tuple[Measurement, dict[str, str]]:
    """Run one system once; what it says of itself."""
    prefix = folder / f"{system}-{round_}"
    if system == OURS:
        words = [
            "-m",
            "oarsmith",
            "preprocess",
            options.data,
            str(prefix),
            "--tokenizer_name_or_path",
            options.tokenizer,
        ]
        # Megatron's tool leaves nothing out and changes nothing.
        words += ["--min_doc_length", "0", "--max_repeated_len", "0", "--workers", str(options.workers)]
        command = [sys.executable, *words]
    else:
        words = ["--tokenizer", options.tokenizer, "--input", options.data, "--output_prefix", str(prefix)]
        command = [options.peer_python, str(PEER), *words, "--workers", str(options.workers)]
    begin, cpu = time.perf_counter(), sum(os.times()[2:4])
    done = subprocess.run(command, capture_output=True, text=True)
    seconds, cpu_seconds = time.perf_counter() - begin, sum(os.times()[2:4]) - cpu
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    if system == OURS:
        report = json.loads(Path(f"{prefix}.report.json").read_text(encoding="utf-8"))
        said = {"encoding_seconds": report["seconds"], "encoded_with": report["encoded_with"]}
    else:
        said = json.loads(done.stdout.splitlines()[-1])
    encoding = float(said.pop("encoding_seconds"))
    return (
        Measurement(system=system, round=round_, seconds=seconds, cpu_seconds=cpu_seconds, encoding_seconds=encoding),
        said,
    )


def spread(values: list[float], digits: int) -> str:
    middle = f"{statistics.median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def table(found: list[Measurement], num_bytes: int) -> str:
    """A Markdown table: medians over the rounds, with the smallest and the largest value."""
    heads = ["", "MB/s, whole process", "Oarsmith / peer", "MB/s, encoding", "Oarsmith / peer", "CPU s"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    ours = [one for one in found if one.system == OURS]
    for system, name in ((THEIRS, "Megatron-style"), (OURS, "**Oarsmith**")):
        rows = [one for one in found if one.system == system]
        ratios = [spread([b.seconds / a.seconds for a, b in zip(ours, rows, strict=True)], 2)]
        ratios += [spread([b.encoding_seconds / a.encoding_seconds for a, b in zip(ours, rows, strict=True)], 2)]
        cells = [
            name,
            spread([num_bytes / 1e6 / one.seconds for one in rows], 2),
            "" if system == OURS else ratios[0],
            spread([num_bytes / 1e6 / one.encoding_seconds for one in rows], 2),
            "" if system == OURS else ratios[1],
            spread([one.cpu_seconds for one in rows], 1),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    options = options_from_command_line()
    num_bytes = Path(options.data).stat().st_size
    found: list[Measurement] = []
    notes: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="oarsmith-bench-") as name:
        folder = Path(name)
        for round_ in range(options.rounds):
            for system in (THEIRS, OURS) if round_ % 2 == 0 else (OURS, THEIRS):
                one, said = measure(options, system, round_, folder)
                found.append(one)
                notes |= said
                rate = num_bytes / 1e6 / one.seconds
                print(f"round {round_ + 1} {system}: {one.seconds:.1f} s, {rate:.2f} MB/s", file=sys.stderr, flush=True)
            for ending in (".bin", ".idx"):
                a, b = (f"{folder}/{system}-{round_}{ending}" for system in (OURS, THEIRS))
                if not filecmp.cmp(a, b, shallow=False):
                    sys.exit(f"the two {ending} files differ")
                os.unlink(a)
                os.unlink(b)
    print("\n" + table(found, num_bytes) + "\n")
    print("the files of both are the same, byte for byte")
    cpu = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")]
    facts = {
        "cpu": f"{names[0] if names else platform.machine()}, {os.cpu_count()} CPUs, {options.workers} workers",
        "data": f"{options.data}, {num_bytes / 1e6:.1f} MB",
        "tokenizer": options.tokenizer,
        "peer's builder, our encoder": f"{notes['builder']}, {notes['encoded_with']}",
        "versions": ", ".join(
            f"{package} {oarsmith.__version__ if package == 'oarsmith' else importlib.metadata.version(package)}"
            for package in ("oarsmith", "tokenizers", "tiktoken", "transformers")
        ),
    }
    for name, value in facts.items():
        print(f"{name}: {value}")
    if options.json:
        Path(options.json).write_text(json.dumps({**facts, "measurements": [asdict(one) for one in found]}, indent=1))


if __name__ == "__main__":
    main()
