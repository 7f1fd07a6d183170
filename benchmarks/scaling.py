"""Does cost grow linearly? Tokens per second over the number of rows and over the length of a row.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --model DIR --data rows.jsonl

Rows: fine-tuning with 1,000, 10,000 and 100,000 rows (the given ones over and over, each with a number in front, so
that no two are the same). Tokens per second must stay within 10 %, and the time before the first step must grow no
faster than the rows. Lengths: pretraining with as many tokens a step in rows of 512 to 4,096; tokens per second must
fall no faster than the model's FLOPs per token grow. Runs of all sizes take turns; the table has medians. Without
--model a Llama of 15M parameters and made-up words are taken. Ends with an error if one of these does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path

from made_up import write_corpus, write_llama, write_tokenizer
from roofline import ModelSize, mean_context, model_size
from turns import OURS, Measurement, Run, Turns, machine, our_command, our_steps, spread

NUM_TOKENS_PER_STEP = 4096
WARMUP_STEPS = 2
# Of tokens per second between the fewest and the most rows, and of a row's cost before the first step.
TOLERANCE = 0.10
VOCAB_SIZE = 32_000


def options_from_command_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Tokens per second over the number of rows and the length of a row.")
    parser.add_argument("--model", help="Hugging Face directory with a chat template")
    parser.add_argument("--data", help='jsonl with one {"src": question, "tgt": answer} a line')
    parser.add_argument("--rows", nargs="*", type=int, default=[1_000, 10_000, 100_000])
    parser.add_argument("--lengths", nargs="*", type=int, default=[512, 1024, 2048, 4096])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="measured steps, after two warm-up steps")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    if (options.model is None) != (options.data is None):
        parser.error("--model and --data go together")
    if any(NUM_TOKENS_PER_STEP % length for length in options.lengths):
        parser.error(f"lengths must divide {NUM_TOKENS_PER_STEP}")
    return options


class Work:
    """The files of all runs."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.folder = folder
        self.model = Path(options.model) if options.model else folder / "model"
        if not options.model:
            write_llama(self.model, hidden=288, layers=6, heads=6, vocab_size=VOCAB_SIZE, positions=4096)
            write_tokenizer(self.model, VOCAB_SIZE)
        pairs = read_pairs(Path(options.data)) if options.data else made_up_pairs()
        for count in options.rows:
            rows = ({"src": f"{i} {src}\n", "tgt": tgt} for i, (src, tgt) in enumerate(repeated(pairs, count)))
            self.rows(count).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        vocab_size = json.loads((self.model / "config.json").read_text())["vocab_size"]
        # Twice as much as is read, so that nothing is seen again.
        num_tokens = 2 * NUM_TOKENS_PER_STEP * (WARMUP_STEPS + options.steps)
        write_corpus(folder / "corpus" / "made-up", num_tokens, vocab_size)

    def rows(self, count: int) -> Path:
        return self.folder / f"rows-{count}.jsonl"

    def start(self, mode: str, _: str, num_steps: int, folder: Path) -> Run:
        """A mode is `rows` or `length` with its size."""
        kind, _, size = mode.partition(" ")
        keys: dict[str, object] = {"model_name_or_path": self.model, "output_dir": folder / "run"}
        keys |= {"max_steps": num_steps, "dtype": "bf16", "device": "cpu", "num_threads": self.options.threads}
        keys |= {"logging_steps": 1, "save_strategy": "no", "disable_tqdm": "true"}
        if kind == "rows":
            keys |= {"dataset_name_or_path": self.rows(int(size)), "zero_padding": "true", "max_length": 512}
            keys |= {} if self.options.model else {"chat_template": "none"}
            keys |= {"per_device_train_batch_size": NUM_TOKENS_PER_STEP // 512}
        else:
            keys |= {"input_dir": self.folder / "corpus" / "made-up", "split": "100,0,0", "continue_training": "true"}
            keys |= {"data_cache": folder / "index-cache", "max_seq_length": int(size)}
            keys |= {"per_device_train_batch_size": NUM_TOKENS_PER_STEP // int(size)}
        return Run(
            command=our_command("sft" if kind == "rows" else "pretrain", keys),
            record_file=folder / "run" / "timing.jsonl",
            read=lambda seen, _: (our_steps(folder / "run", seen), 0),
        )


def read_pairs(path: Path) -> list[tuple[str, str]]:
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [(row["src"], row["tgt"]) for row in rows]


def made_up_pairs(count: int = 1000) -> list[tuple[str, str]]:
    """Between 20 and 350 words."""
    draw = random.Random(0)

    def words(least: int, most: int) -> str:
        return " ".join(f"w{draw.randrange(1, VOCAB_SIZE)}" for _ in range(draw.randint(least, most)))

    return [(words(10, 50), words(10, 300)) for _ in range(count)]


def repeated(pairs: list[tuple[str, str]], count: int) -> list[tuple[str, str]]:
    return (pairs * (count // len(pairs) + 1))[:count]


def before_first_step(one: Measurement) -> float:
    """Seconds from the process's start to that of its first step, which is taken to last as long as a later one."""
    return one.first_step_s - one.seconds_per_step


def report_rows(found: dict[str, list[Measurement]], counts: list[int]) -> list[str]:
    """Prints the table; returns what does not hold."""
    print("\n| rows | real tokens/s | to the fewest rows | before step 1, s | peak MiB |\n|---|---|---|---|---|")
    first = found[f"rows {counts[0]}"]
    ratios = {}
    for count in counts:
        runs = found[f"rows {count}"]
        ratios[count] = [a.tokens_per_second / b.tokens_per_second for a, b in zip(runs, first, strict=True)]
        cells = [f"{count:,}", spread([one.tokens_per_second for one in runs], 1), spread(ratios[count], 2)]
        cells += [spread(list(map(before_first_step, runs)), 1), spread([one.peak_mb for one in runs], 0)]
        print("| " + " | ".join(cells) + " |")
    wrong = []
    if abs(statistics.median(ratios[counts[-1]]) - 1) > TOLERANCE:
        wrong.append(f"tokens per second change by more than {TOLERANCE:.0%} from {counts[0]:,} to {counts[-1]:,} rows")
    if len(counts) >= 3:
        times = {count: statistics.median(map(before_first_step, found[f"rows {count}"])) for count in counts}
        early, late = ((times[b] - times[a]) / (b - a) for a, b in ((counts[0], counts[-2]), (counts[-2], counts[-1])))
        print(f"\na row costs {early * 1e3:.3f} ms before step 1 up to {counts[-2]:,} rows, {late * 1e3:.3f} ms after")
        if late > early * (1 + TOLERANCE):
            wrong.append("the time before the first step grows faster than the rows")
    return wrong


def report_lengths(found: dict[str, list[Measurement]], lengths: list[int], size: ModelSize) -> list[str]:
    """Prints the table; returns what does not hold."""
    print("\n| row length | real tokens/s | to the shortest | FLOPs allow | peak MiB |\n|---|---|---|---|---|")
    flops = {length: size.flops_per_token(mean_context([length]), frozen=False) for length in lengths}
    first, wrong = found[f"length {lengths[0]}"], []
    for length in lengths:
        runs, allowed = found[f"length {length}"], flops[lengths[0]] / flops[length]
        ratios = [a.tokens_per_second / b.tokens_per_second for a, b in zip(runs, first, strict=True)]
        cells = [str(length), spread([one.tokens_per_second for one in runs], 1), spread(ratios, 2), f"{allowed:.2f}"]
        print("| " + " | ".join([*cells, spread([one.peak_mb for one in runs], 0)]) + " |")
        if statistics.median(ratios) < allowed:
            wrong.append(f"at length {length} tokens per second fall faster than the FLOPs grow")
    return wrong


def main() -> None:
    options = options_from_command_line()
    facts = machine(options.threads, ("torch",))
    modes = [f"rows {count}" for count in options.rows] + [f"length {length}" for length in options.lengths]
    found: dict[str, list[Measurement]] = {mode: [] for mode in modes}
    with tempfile.TemporaryDirectory(prefix="oarsmith-bench-work-") as name:
        work = Work(options, Path(name))
        size = model_size(work.model)
        measure = partial(
            Turns(
                start=work.start,
                num_warmup=WARMUP_STEPS,
                num_steps=options.steps,
                num_rounds=options.rounds,
                threads=options.threads,
                caches=None,
            ).measure,
            system=OURS,
        )
        # The first run of all reads files and compiles what the others find: it is not counted.
        measure(modes[0], round_=0)
        for round_ in range(options.rounds):
            for mode in modes if round_ % 2 == 0 else modes[::-1]:
                one = measure(mode, round_=round_)
                found[mode].append(one)
                note = f"{one.tokens_per_second:.1f} real tokens/s, {one.first_step_s:.1f} s to the end of step 1"
                print(f"round {round_ + 1}, {mode}: {note}", file=sys.stderr, flush=True)
    wrong = report_rows(found, options.rows) if options.rows else []
    wrong += report_lengths(found, options.lengths, size) if options.lengths else []
    print(f"\nmodel: {options.model or 'Llama, 15M'}; {NUM_TOKENS_PER_STEP} tokens a step at most")
    for key, value in facts.items():
        print(f"{key}: {value}")
    if wrong:
        sys.exit("does not hold: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
