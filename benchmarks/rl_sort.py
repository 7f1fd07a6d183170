"""Learning by reward alone: a tiny llama sorts six digits.

    python benchmarks/rl_sort.py FOLDER [--seeds 0,1,2] [--seconds 180] [KEY=VALUE ...]

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--warm-steps", type=int, default=50)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("keys", nargs="*")
    given = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warm, held_out = warm_up(given.folder, given.warm_steps), given.folder / "held_out.jsonl"
    print(f"before: drawn {accuracy(warm, held_out, 1.0):.3f}, greedy {accuracy(warm, held_out, 0.0):.3f}")


if __name__ == "__main__":
    main()
