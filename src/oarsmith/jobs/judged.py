"""What ``oarsmith dpo`` and ``oarsmith kto`` share: rows with judged answers, and the reference's view of them."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from oarsmith.adapters.linear import disabled
from oarsmith.adapters.parts import rewrite_of
from oarsmith.checkpoint.fingerprint import fingerprint
from oarsmith.config.dpo import JudgedConfig
from oarsmith.config.resolved import Resolved
from oarsmith.data.answers import with_references
from oarsmith.data.judged import Kind
from oarsmith.jobs import start as starting
from oarsmith.jobs import train as training
from oarsmith.jobs import weights
from oarsmith.jobs.runtime import fit_max_length
from oarsmith.jobs.start import Start
from oarsmith.jobs.weights import Weights
from oarsmith.methods.answers import AnswerRows, answer_options, read_rows, training_data
from oarsmith.methods.data import TrainingData
from oarsmith.methods.reference import compute_references, keep_references, read_references, reference_file
from oarsmith.models import families
from oarsmith.models.decoder import Decoder
from oarsmith.models.sharing import shares_beginnings
from oarsmith.text import Tokenizer
from oarsmith.training.numbers import show_duration

J = TypeVar("J", bound=JudgedConfig)
# Tokens of a batch without gradient.
_CAPACITY = 4096


@dataclass(frozen=True, kw_only=True)
class JudgedData(TrainingData):
    """With the rows themselves; ``share``: whether a prompt lies in a batch once."""

    rows: AnswerRows
    share: bool


def start(resolved: Resolved[J], device: torch.device) -> tuple[Resolved[J], Start]:
    """A checkpoint; ``max_length`` fits its context."""
    config = resolved.config
    begin = starting.from_checkpoint(config, starting.model_directory(config))
    return fit_max_length(starting.settle_dtype(resolved, device), config.max_length, begin.max_positions), begin


def build_data(config: JudgedConfig, begin: Start, tokenizer: Tokenizer, *, kind: Kind, mismatched: bool) -> JudgedData:
    """Rows in packed batches, which know nothing of the reference yet."""
    family, spec = families.build_spec(begin.config)
    share = shares_beginnings(rewrite_of(config, begin.base)(family, spec) if config.has_adapter else spec)
    rows = read_rows(config, config, tokenizer, answer_options(config, kind=kind, mismatched=mismatched, share=share))
    made = training_data(rows, config, config, share=share)
    return JudgedData(**vars(made), rows=rows, share=share)


def with_reference(
    config: JudgedConfig, begin: Start, model: Decoder, data: TrainingData, console: Console
) -> TrainingData:
    """The data with log-probabilities under the model that training begins with, without an adapter; they are kept on
    disk for the next run."""
    assert isinstance(data, JudgedData), data
    rows = data.rows.all
    form = config.weight_quantize_algo if config.has_adapter else "none"
    settings = (config.weight_blocksize, config.weight_double_quant, config.weight_double_quant_block_size)
    file = reference_file(
        rows, f"{fingerprint(begin.base)} {config.dtype} {form} {settings} {begin.config} {data.share}"
    )
    found = read_references(file, rows)
    if found is not None:
        console.print(f"reference: {found.size:,} answers, kept from an earlier run")
    else:
        begun = time.monotonic()
        bar = Progress(
            TextColumn("reference"), BarColumn(), MofNCompleteColumn(), TextColumn("rows, left"), TimeRemainingColumn(),
            console=console, transient=True, disable=not console.is_terminal or config.disable_tqdm,
        )  # fmt: skip
        with bar:
            task = bar.add_task("reference", total=len(rows))
            capacity = max(_CAPACITY, config.max_length)
            with disabled(model):
                found = compute_references(
                    model, rows, share=data.share, capacity=capacity, told=lambda done: bar.update(task, completed=done)
                )
        keep_references(file, found)
        console.print(f"reference: {found.size:,} answers in {show_duration(time.monotonic() - begun)}")
    scored = with_references(rows, found)
    first, second = len(data.rows.train), len(data.rows.train) + len(data.rows.evaluation)
    known = replace(data.rows, train=scored[:first], evaluation=scored[first:second], test=scored[second:])
    return JudgedData(**vars(training_data(known, config, config, share=data.share)), rows=known, share=data.share)


def load_trainable(config: JudgedConfig, begin: Start, device: torch.device) -> Decoder:
    """All weights, or fresh adapters on frozen ones."""
    if config.has_adapter:
        return starting.load_with_adapter(config, config, begin, device)
    return starting.load_whole(config, begin, device)


def weights_of(config: JudgedConfig, begin: Start, tokenizer: Tokenizer) -> Weights:
    """An adapter's files, or a model's."""
    return weights.adapter(begin.base, tokenizer) if config.has_adapter else weights.whole_model(tokenizer)


def plan(config: JudgedConfig) -> str:
    """The rows of a step."""
    length = f"{config.max_length:,} tokens, packed" if config.zero_padding else "one prompt each"
    count = (config.per_device_train_batch_size or 1) * config.gradient_accumulation_steps
    return f"{count} {'row' if count == 1 else 'rows'} ({length})"


def say_next(config: JudgedConfig, result: training.TrainResult, console: Console) -> None:
    """What to do with it."""
    console.print(f"next:   oarsmith chat {result.output_dir}")
    if config.has_adapter:
        console.print(f"        oarsmith merge-adapter {result.output_dir} MERGED   (a plain model, with proof)")
