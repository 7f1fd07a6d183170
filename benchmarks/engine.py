"""Answering: Oarsmith's engine beside other engines on CPUs, the same requests and threads, in one run.

    python benchmarks/engine.py --model DIR --made MODELS --peer llama.cpp=PYTHON openvino-genai=PYTHON ...

Each measurement is a process of its own; engines take turns, and the order is turned around from round to round. Three
parts: `alone` (a prompt of 512 tokens to its first token; 128 tokens after a prompt of 32; the peak memory of that
process), `batch` (32 requests at once, prompts of 64 to 256 tokens, 128 new ones each) and `cold` (from the start of
the process to a first token, all files in the page cache). A peer's models lie in --made under the names that
`CONTENDERS` gives; what is not there is left out. All answers are greedy, and as long as asked for.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine_table import floors, numbers_of, table
from turns import machine

from oarsmith.jobs.bench_report import disturbed
from oarsmith.jobs.bench_systems import Request, Task

ROOT = Path(__file__).parents[1]
PARTS = {"prefill": "alone", "decode": "alone", "memory": "alone", "batch": "batch", "cold": "cold"}
PROMPT, SHORT_PROMPT, NEW, TOGETHER = 512, 32, 128, 32
CHAPTER = "The lighthouse keeper wrote in his book every evening what the sea had brought, and one day he wrote that"
# Most seconds of one measurement.
PATIENCE = 150


@dataclass(frozen=True)
class Contender:
    """An engine with a model.

    Attributes:
        bits: of most of its weights; it is compared with those of the same.
        made: the file or directory of `--made` that it reads; not given: the Hugging Face directory.
        weights: how it is told to round, if it rounds while it loads.
        dtype: in which it computes, if that is to be said.
    """

    system: str
    bits: int
    label: str
    made: str | None = None
    weights: str | None = None
    dtype: str = "bf16"

    @property
    def name(self) -> str:
        return f"{self.system} {self.label}"


OURS = "oarsmith"
CONTENDERS = (
    Contender(OURS, 4, "int4", weights="int4"),
    Contender("llama.cpp", 4, "Q4_0", "q4_0.gguf"),
    Contender("llama.cpp", 4, "Q4_1", "q4_1.gguf"),
    Contender("openvino-genai", 4, "int4", "ov-int4"),
    Contender("onnxruntime-genai", 4, "int4", "ort-int4"),
    Contender(OURS, 8, "int8", weights="int8"),
    Contender("llama.cpp", 8, "Q8_0", "q8_0.gguf"),
    Contender("openvino-genai", 8, "int8", "ov-int8"),
    Contender("ctranslate2", 8, "int8", "ct2-int8", "int8"),
    Contender(OURS, 16, "bf16"),
    Contender("llama.cpp", 16, "BF16", "bf16.gguf"),
    Contender("llama.cpp", 16, "F16", "f16.gguf"),
    Contender("openvino-genai", 16, "bf16", "ov-fp16"),
    Contender("transformers", 16, "bf16"),
)


def options_from_command_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Oarsmith's engine beside other engines.")
    parser.add_argument("--model", required=True, type=Path, help="Hugging Face directory")
    parser.add_argument("--made", type=Path, help="directory with the peers' models")
    parser.add_argument("--peer", nargs="*", default=[], metavar="NAME=PYTHON", help="the Python that has a peer")
    parser.add_argument("--systems", nargs="*", help="only those whose names begin so, e.g. oarsmith 'llama.cpp Q4_0'")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=3, help="of each request of the part alone, in a process")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, help="also write every measurement to this file")
    options = parser.parse_args()
    if any("=" not in word for word in options.peer):
        parser.error("--peer takes NAME=PYTHON")
    options.pythons = {OURS: sys.executable, **dict(word.split("=", 1) for word in options.peer)}
    return options


def chosen(options: argparse.Namespace) -> Iterator[Contender]:
    """Those that are asked for, and can be measured; the others are named."""
    for one in CONTENDERS:
        if options.systems is not None and not any(one.name.startswith(word) for word in options.systems):
            continue
        if one.system not in options.pythons:
            note(f"{one.name}: left out, no --peer {one.system}=PYTHON")
        elif one.made is not None and (options.made is None or not (options.made / one.made).exists()):
            note(f"{one.name}: left out, there is no {one.made} in --made")
        else:
            yield one


class Work:
    """The requests, and how a measurement is made."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        vocab_size = json.loads((options.model / "config.json").read_text())["vocab_size"]
        draw = random.Random(7)

        def request(length: int, size: int) -> Request:
            # Special tokens come first in every vocabulary. No two prompts begin alike.
            return draw.choices(range(min(100, vocab_size // 2), vocab_size), k=length), size

        kinds = {"prefill": (PROMPT, 1), "decode": (SHORT_PROMPT, NEW)}
        alone = [kind for part, kind in kinds.items() if part in options.only] or [kinds["decode"]]
        # First the batch: it is the same whatever else is measured.
        self.requests = {
            "batch": [request(draw.randint(64, 256), NEW) for _ in range(TOGETHER)],
            "alone": [request(*kind) for _ in range(options.repetitions) for kind in alone],
            "cold": [request(SHORT_PROMPT, 1)],
        }

    def measure(self, part: str, one: Contender) -> dict[str, Any]:
        """What the worker found.

        Raises:
            RuntimeError: it failed; with the last line that it printed.
        """
        requests = self.requests[part]
        concurrency = len(requests) if part == "batch" else 1
        config = {"num_threads": self.options.threads, "concurrency": concurrency, "device": "cpu"}
        model = self.options.model if one.made is None else self.options.made / one.made
        task = Task(one.system, {**config, "weights": one.weights}, str(model), one.dtype, requests)
        task_file, result_file = self.folder / "task.json", self.folder / "result.json"
        result_file.unlink(missing_ok=True)
        task_file.write_text(json.dumps({"part": part, **asdict(task), "started": time.time()}))
        worker = Path(__file__).parent / "peers" / "engine_worker.py"
        self._run([self.options.pythons[one.system], str(worker), str(task_file), str(result_file)])
        found: dict[str, Any] = json.loads(result_file.read_text())
        return found

    def warm(self, _: str, one: Contender) -> dict[str, Any]:
        """Files into the page cache; what an engine packs or compiles once is kept."""
        self.measure("cold", one)
        return {}

    def command(self, _: str, one: Contender) -> dict[str, Any]:
        """Seconds from the start of `oarsmith generate` to the first piece of its answer."""
        words = [sys.executable, "-m", "oarsmith", "generate", str(self.options.model), CHAPTER, "--raw", "true"]
        words += ["--max_new_tokens", "2", "--ignore_eos", "true", "--weights", one.weights or "none"]
        start = time.perf_counter()
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=self._environment()) as it:
            assert it.stdout is not None
            piece = it.stdout.read(1)
            seconds = time.perf_counter() - start
            it.communicate()
        if not piece or it.returncode != 0:
            raise RuntimeError("oarsmith generate answered nothing")
        return {"command_s": seconds}

    def _run(self, words: list[str]) -> None:
        output = self.folder / "output.txt"
        with output.open("wb") as printed:
            try:
                settings: dict[str, Any] = {"env": self._environment(), "timeout": PATIENCE, "check": False}
                status = subprocess.run(words, stdout=printed, stderr=subprocess.STDOUT, **settings).returncode
            except subprocess.TimeoutExpired as error:
                raise RuntimeError(f"not finished in {PATIENCE} s") from error
        if status != 0:
            lines = output.read_text(errors="replace").strip().splitlines() or ["nothing was printed"]
            raise RuntimeError(f"exit status {status}: {lines[-1]}")

    def _environment(self) -> dict[str, str]:
        threads = str(self.options.threads)
        return {**os.environ, "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "src")}


def measure_all(work: Work, contenders: list[Contender]) -> dict[str, list[dict[str, Any]]]:
    """Of each contender its measurements in the order in which they were made."""
    found: dict[str, list[dict[str, Any]]] = {one.name: [] for one in contenders}
    failed: set[tuple[str, str]] = set()

    def attempt(what: str, one: Contender, call: Callable[[str, Contender], dict[str, Any]]) -> None:
        if (what, one.name) in failed:
            return
        try:
            measured = {"part": what, **call(what, one)}
        except RuntimeError as error:
            failed.add((what, one.name))
            note(f"{what}, {one.name}: {error}")
            return
        found[one.name].append(measured)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in numbers_of(found[one.name]).items())
        note(f"{what}, {one.name}: {shown}")

    for one in contenders:
        attempt("warm", one, work.warm)
    for part in dict.fromkeys(PARTS[name] for name in work.options.only):
        for round_ in range(work.options.rounds):
            for one in contenders if round_ % 2 == 0 else contenders[::-1]:
                attempt(part, one, work.measure)
                if part == "cold" and one.system == OURS:
                    attempt("command", one, work.command)
    return found


def main() -> None:
    options = options_from_command_line()
    contenders = list(chosen(options))
    if not contenders:
        sys.exit("nothing to measure")
    facts, before = machine(options.threads, ()), floors(options.model, options.threads)
    with tempfile.TemporaryDirectory(prefix="oarsmith-bench-engine-") as name:
        work = Work(options, Path(name))
        found = measure_all(work, contenders)
        lengths = [len(ids) for ids, _ in work.requests["batch"]]
    versions = {key: value for ones in found.values() for one in ones for key, value in one.get("versions", {}).items()}
    # The faster one of both: what the memory can do when nobody else uses it.
    after = floors(options.model, options.threads)
    limits = {bits: max(before[bits], after[bits], key=lambda one: one["tokens_per_s"]) for bits in after}
    print("\n" + table([(one.bits, one.name, found[one.name]) for one in contenders], OURS, limits) + "\n")
    print(
        f"{options.rounds} rounds; {TOGETHER} requests: prompts of {min(lengths)}-{max(lengths)} tokens, {sum(lengths)}"
    )
    answered = {name: [one for one in ones if "waited" in one] for name, ones in found.items()}
    if warning := disturbed({name: ones for name, ones in answered.items() if ones}):
        print(f"note: {warning}")
    for key, value in {**facts, "versions": {**facts["versions"], **versions}}.items():
        print(f"{key}: {value}")
    if options.json is not None:
        options.json.write_text(json.dumps({**facts, "versions": versions, "floors": limits, "found": found}) + "\n")


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
