"""Learning by reward alone: a tiny llama sorts six digits.

    python benchmarks/rl_sort.py FOLDER [--command grpo|ppo] [--seeds 0,1,2] [KEY=VALUE ...]

Makes a model of 0.6 M parameters (3 layers, hidden 128) with a tokenizer of 13 tokens, warms it with `oarsmith sft`
until it sorts 14 to 34 % of the questions right when it draws, and lets `oarsmith grpo` go on from there by a reward: 1
for an answer that is right, and the share of right places (-0.5 where the length is wrong). Each seed is a process of
its own, whose clock includes its start. Prints the share of held-out questions that a drawn answer gets right, before
and after. Further words are keys of `oarsmith grpo`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

NUM_DIGITS, NUM_ROWS, NUM_HELD_OUT = 6, 4096, 256
REWARD = '''"""The reward: 1 for an answer that is right, and the share of right places; -0.5 where the length is
wrong."""


def reward(prompt, completion, **row):
    answer, right = completion.strip(), row["tgt"]
    if len(answer) != len(right):
        return -0.5
    places = sum(a == b for a, b in zip(answer, right)) / len(right)
    return float(answer == right) + places
'''


def make_tokenizer(folder: Path) -> None:
    """Ten digits, "=", an end and a padding token."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    vocab = {token: index for index, token in enumerate([*"0123456789", "=", "<eos>", "<pad>"])}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab=vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<eos>", "<pad>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"eos_token": "<eos>", "pad_token": "<pad>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


def make_fresh(folder: Path) -> None:
    """A llama of 0.6 M parameters with random weights."""
    import oarsmith
    from oarsmith.text import load_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer(folder)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 13,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "torch_dtype": "float32",
        "eos_token_id": 11,
        "pad_token_id": 12,
    }
    model = oarsmith.new_model(config, seed=0)
    (folder / "config.json").write_text(json.dumps(config))
    oarsmith.save_model(model, folder, load_tokenizer(folder))


def make_rows(folder: Path) -> None:
    """Questions with answers: to warm up on, to learn by reward, and others to be asked at the end."""
    draw = random.Random(7)
    seen: dict[str, str] = {}
    while len(seen) < 2 * NUM_ROWS + NUM_HELD_OUT:
        digits = "".join(draw.choice("0123456789") for _ in range(NUM_DIGITS))
        seen.setdefault(digits, "".join(sorted(digits)))
    rows = [{"src": f"{asked}=", "tgt": right} for asked, right in seen.items()]
    parts = {"warm": rows[:NUM_ROWS], "train": rows[NUM_ROWS : 2 * NUM_ROWS], "held_out": rows[2 * NUM_ROWS :]}
    for name, part in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    (folder / "reward.py").write_text(REWARD)


def oarsmith_command(*words: str) -> float:
    """Run a command in a process of its own; seconds."""
    begun = time.monotonic()
    subprocess.run([sys.executable, "-m", "oarsmith", *words], check=True, stdin=subprocess.DEVNULL)
    return time.monotonic() - begun


def warm_up(folder: Path, steps: int) -> Path:
    """The start: fine-tuned for some steps of 64 rows."""
    fresh, warm = folder / "fresh", folder / "warm"
    if not (warm / "model" / "config.json").is_file():
        make_fresh(fresh)
        make_rows(folder)
        words = ["--max_steps", str(steps), "--learning_rate", "1e-3", "--lr_scheduler_type", "constant"]
        words += ["--zero_padding", "false", "--per_device_train_batch_size", "64", "--dtype", "fp32"]
        words += ["--chat_template", "none", "--output_dir", str(warm), "--save_strategy", "no", "--disable_tqdm"]
        oarsmith_command("sft", str(fresh), str(folder / "warm.jsonl"), *words, "--overwrite_output_dir")
    return warm


def accuracy(model: Path, held_out: Path, temperature: float) -> float:
    """The share of questions that one answer each gets right."""
    import oarsmith

    engine = oarsmith.Engine(model, batch_size=128)
    rows = [json.loads(line) for line in held_out.read_text().splitlines()]
    sampling = oarsmith.Sampling(max_new_tokens=NUM_DIGITS + 1, temperature=temperature, seed=5)
    answers = engine.generate([row["src"] for row in rows], sampling)
    return sum(answer.text == row["tgt"] for answer, row in zip(answers, rows, strict=True)) / len(rows)


def learn(folder: Path, warm: Path, seed: int, keys: dict[str, str]) -> dict[str, float]:
    """One run; its seconds, updates a second, and accuracies on the held-out questions."""
    command, output = keys["command"], folder / f"{keys['command']}-{seed}"
    words = [f"--{key}={value}" for key, value in keys.items() if key != "command"]
    words += [f"--rewards={folder / 'reward.py'}:reward", "--chat_template=none", "--dtype=fp32", f"--seed={seed}"]
    words += [f"--output_dir={output}", "--overwrite_output_dir", "--save_strategy=no", "--disable_tqdm"]
    seconds = oarsmith_command(command, str(warm), str(folder / "train.jsonl"), *words)
    drawn, greedy = (accuracy(output, folder / "held_out.jsonl", temperature) for temperature in (1.0, 0.0))
    steps = int(keys["max_steps"])
    return {"seed": seed, "seconds": seconds, "steps/s": steps / seconds, "drawn": drawn, "greedy": greedy}


DEFAULTS = {
    "grpo": {"prompts_per_step": 8, "samples_per_prompt": 16, "max_steps": 800},
    "ppo": {"prompts_per_step": 32, "samples_per_prompt": 4, "max_steps": 700, "kl_coeff": 0},
}
SHARED = {"max_new_tokens": 7, "learning_rate": 1.5e-4, "warmup_steps": 20, "logging_steps": 10, "pass_reward": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--command", choices=sorted(DEFAULTS), default="grpo")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--warm-steps", type=int, default=50)
    parser.add_argument("keys", nargs="*", help="KEY=VALUE of the command")
    given = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warm, held_out = warm_up(given.folder, given.warm_steps), given.folder / "held_out.jsonl"
    print(f"before: drawn {accuracy(warm, held_out, 1.0):.3f}, greedy {accuracy(warm, held_out, 0.0):.3f}", flush=True)
    chosen = {**SHARED, **DEFAULTS[given.command], **dict(word.split("=", 1) for word in given.keys)}
    keys = {"command": given.command, **{key: str(value) for key, value in chosen.items()}}
    rows = [learn(given.folder, warm, int(seed), keys) for seed in given.seeds.split(",")]
    for row in rows:
        print("  ".join(f"{name} {value:.3f}" if name != "seed" else f"seed {value}" for name, value in row.items()))
    means = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0] if name != "seed"}
    print("mean    " + "  ".join(f"{name} {value:.3f}" for name, value in means.items()))
    draw_curves(
        given.folder / f"{given.command}-curves.png", [given.folder / f"{given.command}-{row['seed']}" for row in rows]
    )


def draw_curves(picture: Path, runs: list[Path]) -> None:
    """The share of drawn answers that are right over the steps, a line a seed."""
    import matplotlib
    import numpy

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from oarsmith.training.plots import running_mean

    figure, ax = pyplot.subplots(figsize=(7, 3.5), dpi=150, layout="constrained")
    for run in runs:
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        found = numpy.array([(line["step"], line["pass_rate"]) for line in lines if "pass_rate" in line])
        ax.plot(found[:, 0], running_mean(found[:, 1]), label=run.name)
    ax.set_xlabel("step")
    ax.set_ylabel("drawn answers that are right")
    ax.grid(axis="y", alpha=0.3)
    ax.legend()
    figure.savefig(picture)
    print(f"picture: {picture}")


if __name__ == "__main__":
    main()
