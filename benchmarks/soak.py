"""Does memory stay constant? One long `oarsmith pretrain` with a checkpoint every minute, its resident memory watched.

    python benchmarks/soak.py --minutes 60 --picture soak.png

A small Llama on made-up words. A short run first tells how many steps a minute has; then the process's resident memory
is read once a second (proc(5), statm) until it is asked to stop (SIGTERM). The slope is the median of those between
any two points after the first quarter (Theil-Sen), each point the median of ten seconds, so that single checkpoints do
not move it. Ends with an error if memory grows.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from made_up import write_corpus, write_llama, write_tokenizer
from turns import machine, our_command
from watched import environment, watch

VOCAB_SIZE = 4096
NUM_TOKENS = 2_000_000
PILOT_STEPS = 60
SECONDS_PER_POINT = 10
# What is left out at the start: allocators and caches fill up.
SHARE_LEFT_OUT = 0.25
# A rise that is smaller than this over the whole run cannot be told from noise; it decides runs of a few minutes.
NOISE_MB = 4.0
STOP_SECONDS = 120


def options_from_command_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Resident memory of a long pretraining run that saves every minute.")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--limit", type=float, default=8.0, help="MiB an hour above which the run has failed")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--picture", help="draw memory over time into this file")
    options = parser.parse_args()
    if options.minutes < 1:
        parser.error("at least one minute")
    return options


def command(work: Path, run_folder: Path, threads: int, **more: object) -> list[str]:
    keys = {
        "model_name_or_path": work / "model",
        "input_dir": work / "corpus" / "made-up",
        "split": "99,1,0",
        "data_cache": work / "index-cache",
        "continue_training": "true",
        "output_dir": run_folder,
        "max_seq_length": 256,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "dtype": "bf16",
        "device": "cpu",
        "num_threads": threads,
        "logging_steps": 1,
        "disable_tqdm": "true",
    }
    return our_command("pretrain", keys | more)


def steps_per_minute(work: Path, threads: int) -> int:
    """From the second half of a short run."""
    run_folder = work / "pilot"
    keys = {"max_steps": PILOT_STEPS, "save_strategy": "no"}
    record_file, output = run_folder / "timing.jsonl", work / "pilot.txt"
    seen = watch(command(work, run_folder, threads, **keys), record_file, PILOT_STEPS, threads=threads, output=output)
    rates = [record["tokens_per_second"] for record in seen.records[PILOT_STEPS // 2 :]]
    return max(1, round(60 * float(np.median(rates)) / (4 * 256)))


def soak(
    arguments: list[str], run_folder: Path, minutes: float, threads: int, output: Path
) -> tuple[np.ndarray, list[float]]:
    """Seconds since the first step and MiB, [samples, 2], and the seconds at which a new checkpoint was there."""
    page = os.sysconf("SC_PAGE_SIZE") / 2**20
    samples: list[tuple[float, float]] = []
    checkpoints: dict[str, float] = {}
    start: float | None = None
    with output.open("w") as log:
        process = subprocess.Popen(arguments, stdout=log, stderr=subprocess.STDOUT, env=environment(threads))
        while process.poll() is None and (start is None or time.perf_counter() - start < 60 * minutes):
            if start is None and (run_folder / "timing.jsonl").is_file():
                start = time.perf_counter()
            if start is not None:
                now = time.perf_counter() - start
                samples.append((now, int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * page))
                for path in run_folder.glob("checkpoint-*"):
                    checkpoints.setdefault(path.name, now)
            time.sleep(1)
        if process.poll() is not None:
            sys.exit(f"the run ended early:\n{output.read_text(errors='replace')[-3000:]}")
        process.send_signal(signal.SIGTERM)
        status = process.wait(STOP_SECONDS)
    if status != 128 + signal.SIGTERM:
        sys.exit(f"exit status {status} after SIGTERM:\n{output.read_text(errors='replace')[-3000:]}")
    return np.array(samples), sorted(checkpoints.values())


def points(samples: np.ndarray) -> np.ndarray:
    """[points, 2]: the medians of ten seconds each, the first quarter left out."""
    kept = samples[samples[:, 0] >= SHARE_LEFT_OUT * samples[-1, 0]]
    groups = (kept[:, 0] // SECONDS_PER_POINT).astype(int)
    return np.array([np.median(kept[groups == group], axis=0) for group in np.unique(groups)])


def slope(line: np.ndarray) -> float:
    """MiB a second: the median of the slopes of all pairs of points."""
    first, second = np.triu_indices(len(line), 1)
    steps = line[second] - line[first]
    return float(np.median(steps[:, 1] / steps[:, 0]))


def draw(path: Path, samples: np.ndarray, line: np.ndarray, checkpoints: list[float], per_hour: float) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4))
    axes.plot(samples[:, 0] / 60, samples[:, 1], linewidth=0.8, color="0.6", label="resident memory, every second")
    axes.plot(line[:, 0] / 60, line[:, 1], linewidth=1.5, label=f"medians of 10 s: {per_hour:+.2f} MiB an hour")
    axes.plot([t / 60 for t in checkpoints], [samples[:, 1].max()] * len(checkpoints), "|", label="a checkpoint")
    axes.set(xlabel="minutes", ylabel="MiB", ylim=(0, None))
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    options = options_from_command_line()
    with tempfile.TemporaryDirectory(prefix="oarsmith-soak-") as name:
        work = Path(name)
        write_llama(work / "model", hidden=128, layers=4, heads=4, vocab_size=VOCAB_SIZE, positions=512)
        write_tokenizer(work / "model", VOCAB_SIZE)
        write_corpus(work / "corpus" / "made-up", NUM_TOKENS, VOCAB_SIZE)
        per_minute = steps_per_minute(work, options.threads)
        print(f"{per_minute:,} steps a minute", file=sys.stderr, flush=True)
        run_folder = work / "run"
        # More than it can do in the time: it is stopped from outside.
        max_steps = 100 + int(10 * per_minute * options.minutes)
        keys = {"max_steps": max_steps, "save_strategy": "steps", "save_steps": per_minute, "save_total_limit": 2}
        arguments = command(work, run_folder, options.threads, **keys)
        samples, checkpoints = soak(arguments, run_folder, options.minutes, options.threads, work / "output.txt")
        last = json.loads((run_folder / "timing.jsonl").read_text().splitlines()[-1])
    line = points(samples)
    per_hour = 3600 * slope(line)
    rise = per_hour / 3600 * (line[-1, 0] - line[0, 0])
    print(f"resident memory: {per_hour:+.2f} MiB an hour after the first quarter ({rise:+.2f} MiB in that time)")
    print(f"median {np.median(line[:, 1]):.1f} MiB, highest {samples[:, 1].max():.1f} MiB, {len(samples)} samples")
    print(f"{len(checkpoints)} checkpoints in {samples[-1, 0] / 60:.1f} minutes, {last['step']:,} steps")
    for key, value in machine(options.threads, ("torch",)).items():
        print(f"{key}: {value}")
    if options.picture:
        draw(Path(options.picture), samples, line, checkpoints, per_hour)
    if not checkpoints:
        sys.exit("no checkpoint was written")
    if per_hour > options.limit and rise > NOISE_MB:
        sys.exit(f"memory grows by {per_hour:.1f} MiB an hour; {options.limit} are allowed")


if __name__ == "__main__":
    main()
