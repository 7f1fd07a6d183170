"""``oarsmith quickstart``: the main job on a real small model, in minutes, on a laptop.

SmolLM2-135M-Instruct comes out of a Python package, is fine-tuned with LoRA on a persona and some house facts, merged
with proof, and asked questions it has never seen, before and after.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from oarsmith import demo
from oarsmith.atomic import atomic_write_text
from oarsmith.checkpoint.demo import find_demo_gguf
from oarsmith.config.load import load_config
from oarsmith.config.resolved import Resolved
from oarsmith.config.sft import SftConfig
from oarsmith.config.tools import QuickstartConfig
from oarsmith.engine import Engine, Sampling
from oarsmith.errors import ConfigError
from oarsmith.jobs import merge_adapter, sft
from oarsmith.jobs.console import make_console
from oarsmith.jobs.convert import gguf_to_directory
from oarsmith.jobs.train import train
from oarsmith.kernels.memory import keep_freed_memory
from oarsmith.loading import load_model
from oarsmith.models.decoder import Decoder
from oarsmith.text import Tokenizer, load_tokenizer
from oarsmith.training.evaluate import text_perplexity
from oarsmith.training.report import write_report

# Found by trial on 2 cores (LOG.md): adapting only the upper layers teaches the facts and disturbs little else.
RECIPE = {
    "lora": "true",
    "lora_rank": "16",
    "lora_target_modules": r".*layers\.(1[0-9]|2[0-9])\.(mlp\.down_proj|self_attn\.o_proj)",
    "learning_rate": "1.5e-3",
    "lr_scheduler_type": "cosine",
    "warmup_ratio": "0.1",
    "num_train_epochs": "5",
    "max_length": "512",
    "per_device_train_batch_size": "1",
    "logging_steps": "5",
    "save_strategy": "epoch",
    "save_total_limit": "1",
}
PASS_SHARE = 0.9
PASS_PERPLEXITY = 1.03


@dataclass(frozen=True)
class Examination:
    """Answers to the held-out questions, and perplexity on text that has nothing to do with them."""

    answers: list[str]
    right: list[bool]
    perplexity: float

    def summary(self) -> dict[str, float]:
        return {"right": sum(self.right), "total": len(self.right), "perplexity": self.perplexity}


def run(resolved: Resolved[QuickstartConfig]) -> int:
    """The command; 1 when the measured result misses what the quickstart promises."""
    config, console, begin = resolved.config, make_console(), time.perf_counter()
    keep_freed_memory()
    out = Path(config.output_dir)
    base, run_dir = out / "SmolLM2-135M-Instruct", out / "run"
    if run_dir.exists() and not config.overwrite_output_dir:
        raise ConfigError(
            f"{run_dir} exists already",
            where="output_dir",
            fix=f"talk to it (oarsmith chat {run_dir}), start over with --overwrite_output_dir, or name another folder",
        )
    console.rule("1/5 the model")
    if not base.exists():
        gguf_to_directory(find_demo_gguf(), base, "bf16", console)
    tokenizer = load_tokenizer(base)
    console.print(f"SmolLM2-135M-Instruct, unpacked from GGUF into {base}")
    console.rule("2/5 before training")
    before = examine(load_model(base), tokenizer, console)
    console.rule("3/5 fine-tuning with LoRA")
    result = train(load_config(SftConfig, None, training_words(base, run_dir, config)), sft.RECIPE, console)
    console.rule("4/5 merging the adapter")
    questions = [item.question for item in demo.load_heldout()]
    proof = merge_adapter.merge(base, result.model_dir, run_dir / "merged", tokenizer, questions, kl_budget=1e-2)
    merge_adapter.print_proof(proof, console)
    atomic_write_text(run_dir / "merge_proof.json", json.dumps(asdict(proof), indent=1) + "\n")
    console.rule("5/5 after training")
    after = examine(load_model(run_dir / "merged"), tokenizer, console)
    good = show(before, after, run_dir, console)
    write_report(run_dir)
    console.print(f"\nall of it took {time.perf_counter() - begin:.0f} s; report with pictures: {run_dir}/report.html")
    console.print(f"next: oarsmith chat {run_dir}")
    return 0 if good else 1


def examine(model: Decoder, tokenizer: Tokenizer, console: Console) -> Examination:
    """Ask every held-out question (greedy) and measure perplexity on the unrelated text."""
    items = demo.load_heldout()
    engine = Engine(model, tokenizer, batch_size=len(items))
    prompts = [[{"role": "user", "content": item.question}] for item in items]
    with console.status(f"asking {len(items)} questions that are not in the training data"):
        completions = engine.generate(prompts, Sampling(max_new_tokens=60))
        answers = [completion.text.strip() for completion in completions]
        perplexity = text_perplexity(model, tokenizer.encode(demo.unrelated_text()))
    right = [demo.is_right(answer, item) for answer, item in zip(answers, items, strict=True)]
    console.print(f"right: {sum(right)} of {len(right)}; perplexity on unrelated prose: {perplexity:.2f}")
    return Examination(answers, right, perplexity)


def show(before: Examination, after: Examination, run_dir: Path, console: Console) -> bool:
    """Both answers side by side, the scores, and whether they reach what is promised."""
    table = Table(title="held-out questions, before and after", show_lines=True)
    for name in ("question", "before", "after", ""):
        table.add_column(name, overflow="fold")
    rows = []
    for index, item in enumerate(demo.load_heldout()):
        mark = Text("right", style="green") if after.right[index] else Text("wrong", style="red")
        table.add_row(item.question, _short(before.answers[index]), _short(after.answers[index]), mark)
        rows.append(
            {
                "question": item.question,
                "before": before.answers[index],
                "after": after.answers[index],
                "before_right": before.right[index],
                "after_right": after.right[index],
            }
        )
    console.print(table, soft_wrap=False)
    content = {"before": before.summary(), "after": after.summary(), "rows": rows}
    atomic_write_text(run_dir / "answers.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    share, worse = sum(after.right) / len(after.right), after.perplexity / before.perplexity
    console.print(f"right answers: {sum(before.right)} -> {sum(after.right)} of {len(after.right)}")
    console.print(
        f"perplexity on unrelated prose: {before.perplexity:.2f} -> {after.perplexity:.2f} ({worse - 1:+.1%})"
    )
    good = share >= PASS_SHARE and worse <= PASS_PERPLEXITY
    if not good:
        console.print(
            f"below what this demo promises (at least {PASS_SHARE:.0%} right, at most "
            f"{PASS_PERPLEXITY - 1:.0%} worse on unrelated text): please report it with {run_dir}/report.html",
            style="red",
        )
    return good


def _short(text: str, limit: int = 160) -> str:
    return text if len(text) <= limit else text[:limit].rsplit(" ", 1)[0] + " ..."


def training_words(base: Path, run_dir: Path, config: QuickstartConfig) -> list[str]:
    """What ``oarsmith sft`` is told."""
    paths = ["--model_name_or_path", str(base), "--dataset_name_or_path", str(demo.train_path())]
    recipe = [f"--{key}={value}" for key, value in RECIPE.items()]
    overwrite = ["--overwrite_output_dir", str(config.overwrite_output_dir).lower()]
    return [*paths, "--output_dir", str(run_dir), "--seed", str(config.seed), *overwrite, *recipe]
