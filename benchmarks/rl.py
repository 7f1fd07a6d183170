"""Seconds of a step of `oarsmith grpo` beside TRL's GRPOTrainer, on this machine, in one run, in turns.

    python benchmarks/rl.py --model DIR --prompts prompts.jsonl [--peer_python PYTHON] [--rounds 2]

Both sides answer the same prompts with as many tokens (nothing ends an answer early), score them by the same rule and
make one update of all weights with AdamW. `--peer_python` is the Python of an environment with trl; without it only
Oarsmith runs. Seconds of a step are split into drawing answers and the rest (log-probabilities, rewards, update). The
first step of a run is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REWARD = """def reward(prompt, completion, **row):
    words = completion.split()
    return len(set(words)) / max(len(words), 1)
"""


def options_from_command_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Oarsmith beside TRL on the same prompts.")
    parser.add_argument("--model", required=True, help="Hugging Face directory that both sides read")
    parser.add_argument("--prompts", required=True, help="jsonl with prompt or src on each line")
    parser.add_argument("--peer_python", help="Python of an environment that has trl")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="steps of a run; the first one is not counted")
    parser.add_argument("--prompts_per_step", type=int, default=2)
    parser.add_argument("--samples", type=int, default=4, help="answers to each prompt")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer")
    parser.add_argument("--beta", type=float, default=0.04, help="weight of the KL term")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    return parser.parse_args()


def ours(options: argparse.Namespace, folder: Path) -> list[tuple[float, float]]:
    """(drawing, whole step) of each counted step, in seconds."""
    (folder / "reward.py").write_text(REWARD)
    words = ["grpo", options.model, options.prompts, f"--rewards={folder / 'reward.py'}:reward"]
    words += [f"--prompts_per_step={options.prompts_per_step}", f"--samples_per_prompt={options.samples}"]
    words += [f"--max_new_tokens={options.tokens}", f"--min_new_tokens={options.tokens}", f"--dtype={options.dtype}"]
    words += [f"--kl_loss_coeff={options.beta}", "--learning_rate=1e-5", "--lr_scheduler_type=constant"]
    words += [f"--max_steps={options.steps}", f"--num_threads={options.threads}", "--save_strategy=no"]
    words += [f"--output_dir={folder / 'run'}", "--overwrite_output_dir", "--logging_steps=1", "--num_sample_rows=0"]
    subprocess.run([sys.executable, "-m", "oarsmith", *words], check=True, stdin=subprocess.DEVNULL)
    log, speeds, times = (
        [json.loads(line) for line in (folder / "run" / name).read_text().splitlines()]
        for name in ("log.jsonl", "timing.jsonl", "rollout_timing.jsonl")
    )
    tokens = [record["tokens"] for record in log if "tokens" in record]
    each = [b - a for a, b in zip([0, *tokens], tokens, strict=False)]
    whole = [count / speed["tokens_per_second"] for count, speed in zip(each, speeds, strict=True)]
    return [(time["sampling"], seconds) for time, seconds in zip(times, whole, strict=True)][1:]


def theirs(options: argparse.Namespace, folder: Path) -> list[tuple[float, float]]:
    """The same of TRL."""
    script = Path(__file__).parent / "peers" / "trl_grpo.py"
    result = folder / "peer.json"
    settings = {name: value for name, value in vars(options).items() if name not in ("peer_python", "rounds")}
    command = [options.peer_python, str(script), json.dumps(settings), str(result)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, check=True, env=environment)
    return [(found["generation"], found["step"]) for found in json.loads(result.read_text())][1:]


def main() -> None:
    options = options_from_command_line()
    sides = {"Oarsmith": ours} | ({"TRL": theirs} if options.peer_python else {})
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(options.rounds):
        for name, run in sides.items():
            with tempfile.TemporaryDirectory() as folder:
                begun = time.monotonic()
                found[name] += run(options, Path(folder))
                print(f"{name}: {time.monotonic() - begun:.0f} s with its start", flush=True)
    print(f"{options.prompts_per_step} prompts x {options.samples} answers of {options.tokens} tokens, {options.dtype}")
    medians = {name: [statistics.median(part) for part in zip(*steps, strict=True)] for name, steps in found.items()}
    for name, (drawing, whole) in medians.items():
        print(f"{name:<10} drawing {drawing:7.2f} s   the rest {whole - drawing:7.2f} s   a step {whole:7.2f} s")
    if len(medians) == 2:
        print(f"TRL / Oarsmith: {medians['TRL'][1] / medians['Oarsmith'][1]:.1f}")


if __name__ == "__main__":
    main()
