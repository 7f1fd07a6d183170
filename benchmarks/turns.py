"""What the training benchmarks share: trainers measured in turns, and the table of it.

Every measurement is a process of its own. Before the rounds each trainer starts once with empty caches (`cold`), which
also fills them. In a round the trainers take turns, and the order is turned around from round to round, so that a
machine that is busy for a while is busy for everybody; ratios are taken within a round.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from watched import Watched, watch

import oarsmith

OURS = "oarsmith"
# The same update in less memory.
LEAN = "oarsmith-lean"
OUR_NAMES = {OURS: "**Oarsmith**", LEAN: "**Oarsmith**, in less memory"}


@dataclass(frozen=True, kw_only=True)
class Run:
    """A command, the file in which it notes its steps, and how to read its record.

    Attributes:
        read: from what was seen and the command's output to its steps (seconds, tokens, loss) and the number of tokens
            in its data set.
    """

    command: Sequence[str]
    record_file: Path
    read: Callable[[Watched, str], tuple[list[dict[str, float]], int]]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One process. Rates are over the measured steps: real tokens (no padding) per second of wall time.

    Attributes:
        steps: what was noted of every step, warm-up included.
    """

    mode: str
    system: str
    round: int
    tokens_per_second: float
    tokens_per_step: float
    seconds_per_step: float
    peak_mb: float
    first_step_s: float
    cpu_share: float
    losses: list[float]
    steps: list[dict[str, float]]
    dataset_tokens: int


@dataclass(frozen=True, kw_only=True)
class Turns:
    """Who is measured, and how.

    Attributes:
        start: the `Run` of (mode, system, number of steps, a folder for its files).
        caches: an empty folder that takes the caches of what is compiled. None: they stay where they always are, and
            there is no first start.
    """

    start: Callable[[str, str, int, Path], Run]
    num_warmup: int
    num_steps: int
    num_rounds: int
    threads: int
    caches: Path | None
    cold: dict[tuple[str, str], float] = field(default_factory=dict)

    def measure_all(self, modes: Sequence[str], systems: Callable[[str], Sequence[str]]) -> list[Measurement]:
        """All rounds; `systems(mode)` are the trainers that have the mode. Progress goes to stderr."""
        found = []
        for mode in modes:
            names = systems(mode)
            for system in names:
                self.cold[mode, system] = self._run(mode, system, 1)[0].first_step_s
                _note(f"{mode} {system}: {self.cold[mode, system]:.1f} s to the end of step 1 with empty caches")
            for round_ in range(self.num_rounds):
                for system in names if round_ % 2 == 0 else names[::-1]:
                    one = self.measure(mode, system, round_)
                    found.append(one)
                    rate = f"{one.tokens_per_second:.1f} real tokens/s, {one.peak_mb:.0f} MiB, CPU {one.cpu_share:.0%}"
                    _note(f"{mode} round {round_ + 1} {system}: {rate}")
        return found

    def measure(self, mode: str, system: str, round_: int) -> Measurement:
        """One trainer once, with the caches of its first start."""
        num_steps = self.num_warmup + self.num_steps
        seen, steps, dataset_tokens = self._run(mode, system, num_steps)
        measured = steps[self.num_warmup :]
        seconds, tokens = (sum(step[key] for step in measured) for key in ("seconds", "tokens"))
        return Measurement(
            mode=mode,
            system=system,
            round=round_,
            tokens_per_second=tokens / seconds,
            tokens_per_step=tokens / len(measured),
            seconds_per_step=seconds / len(measured),
            peak_mb=seen.peak_mb,
            first_step_s=seen.first_step_s,
            cpu_share=seen.cpu_share,
            losses=[step["loss"] for step in steps],
            steps=steps,
            dataset_tokens=dataset_tokens,
        )

    def losses(self, mode: str, system: str, num_steps: int) -> list[float]:
        """The loss of each step of one longer run."""
        return [step["loss"] for step in self._run(mode, system, num_steps)[1]]

    def _run(self, mode: str, system: str, num_steps: int) -> tuple[Watched, list[dict[str, float]], int]:
        caches = None if self.caches is None else self.caches / f"{mode}-{system}"
        with tempfile.TemporaryDirectory(prefix="oarsmith-bench-") as name:
            run, output = self.start(mode, system, num_steps, Path(name)), Path(name) / "output.txt"
            seen = watch(run.command, run.record_file, num_steps, threads=self.threads, output=output, caches=caches)
            return seen, *run.read(seen, output.read_text(errors="replace"))


def our_command(name: str, keys: dict[str, object]) -> list[str]:
    """The command a user types: the whole job, its log, its final model and its report included."""
    return [sys.executable, "-m", "oarsmith", name, *(word for k, v in keys.items() for word in (f"--{k}", str(v)))]


def our_steps(run_folder: Path, seen: Watched) -> list[dict[str, float]]:
    """Seconds from timing.jsonl, tokens and loss from log.jsonl."""
    lines = (run_folder / "log.jsonl").read_text().splitlines()
    steps, before = [], 0
    for record, timing in zip([r for r in map(json.loads, lines) if "loss" in r], seen.records, strict=True):
        tokens, before = record["tokens"] - before, record["tokens"]
        steps.append({"tokens": tokens, "seconds": tokens / timing["tokens_per_second"], "loss": record["loss"]})
    return steps


def peer_command(python: str, script: str, keys: dict[str, object]) -> list[str]:
    path = Path(__file__).parent / "peers" / script
    return [python, str(path), *(word for key, value in keys.items() for word in (f"--{key}", str(value)))]


def peer_steps(seen: Watched, output: str) -> tuple[list[dict[str, float]], int]:
    """The lines that a peer wrote, and the number of tokens it said its data set has."""
    line = next(text for text in output.splitlines() if text.startswith("tokens in the data set"))
    return seen.records, int(line.rpartition(" ")[2])


def table(
    found: list[Measurement],
    names: dict[str, str],
    cold: dict[tuple[str, str], float],
    mfu: Callable[[Measurement], float],
) -> str:
    """A Markdown table: medians over the rounds, with the smallest and the largest value.

    Args:
        names: the peers' names in the table.
        mfu: the share of the machine's matrix rate that a measurement's real tokens come to.
    """
    heads = ["", "", "real tokens/s", "Oarsmith / peer", "MFU", "s/step", "real tokens/step", "peak MiB"]
    heads += ["start to end of step 1, s", "with empty caches, s", "CPU"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for mode, system in dict.fromkeys((one.mode, one.system) for one in found):
        ours = sorted((one for one in found if (one.mode, one.system) == (mode, OURS)), key=lambda one: one.round)
        rows = sorted((one for one in found if (one.mode, one.system) == (mode, system)), key=lambda one: one.round)
        ratios = [a.tokens_per_second / b.tokens_per_second for a, b in zip(ours, rows, strict=True)]
        cells = [
            mode,
            {**names, **OUR_NAMES}[system],
            spread([one.tokens_per_second for one in rows], 1),
            "" if system == OURS else spread(ratios, 2),
            f"{statistics.median(map(mfu, rows)):.0%}",
            spread([one.seconds_per_step for one in rows], 2),
            f"{statistics.median(one.tokens_per_step for one in rows):.0f}",
            spread([one.peak_mb for one in rows], 0),
            spread([one.first_step_s for one in rows], 1),
            f"{cold[mode, system]:.1f}",
            f"{statistics.median(one.cpu_share for one in rows):.0%}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(values: list[float], digits: int) -> str:
    middle = f"{statistics.median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def machine(threads: int, packages: Sequence[str]) -> dict[str, Any]:
    """What every number depends on."""
    cpu = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": f"{names[0] if names else platform.machine()}, {os.cpu_count()} CPUs, {threads} threads",
        "versions": {"oarsmith": oarsmith.__version__, **{name: importlib.metadata.version(name) for name in packages}},
        "load_before": os.getloadavg()[0],
    }


def draw_curves(path: Path, curves: dict[str, list[float]], title: str) -> str:
    """Loss curves on top of each other, the first one being the reference; returns their differences in words."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    (reference_name, reference), *others = curves.items()
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(9, 6), sharex=True, height_ratios=[3, 1])
    steps = range(1, len(reference) + 1)
    above.plot(steps, reference, color="0.6", linewidth=3, label=reference_name)
    said = []
    for name, losses in others:
        gaps = [a - b for a, b in zip(losses, reference, strict=True)]
        above.plot(steps, losses, linewidth=1, label=name)
        below.plot(steps, gaps, linewidth=1, label=f"{name} - {reference_name}")
        mean, tail = sum(map(abs, gaps)) / len(gaps), gaps[-max(1, len(gaps) // 10) :]
        said.append(
            f"{name}: {max(map(abs, gaps)):.4f} at most from {reference_name} over {len(gaps)} steps, {mean:.4f} on "
            f"average, {sum(tail) / len(tail):+.4f} in the last {len(tail)} steps"
        )
    above.set_ylabel("loss (nats per token)")
    above.set_title(title)
    above.legend()
    below.axhline(0, color="0.6", linewidth=1)
    below.set_xlabel("step")
    below.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    return "\n".join(said)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
