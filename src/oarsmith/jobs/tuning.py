"""What commands share that train on rows from a checkpoint: all weights, or adapters on frozen ones."""

from __future__ import annotations

from typing import TypeVar

import torch
from rich.console import Console

from oarsmith.config.adapter_virtual import UNMERGEABLE
from oarsmith.config.dpo import JudgedConfig
from oarsmith.config.policy import PolicyConfig
from oarsmith.config.resolved import Resolved
from oarsmith.config.sft import SftConfig
from oarsmith.jobs import start as starting
from oarsmith.jobs import train as training
from oarsmith.jobs import weights
from oarsmith.jobs.runtime import fit_max_length
from oarsmith.jobs.start import Start
from oarsmith.jobs.weights import Weights
from oarsmith.models.decoder import Decoder
from oarsmith.text import Tokenizer

RowsConfig = SftConfig | JudgedConfig
TuneConfig = RowsConfig | PolicyConfig
T = TypeVar("T", bound=RowsConfig)


def inputs(config: TuneConfig) -> list[str | None]:
    """Files that are read."""
    return [config.dataset_name_or_path, config.eval_dataset_path]


def start(resolved: Resolved[T], device: torch.device, *, scoring: bool = False) -> tuple[Resolved[T], Start]:
    """A checkpoint; ``max_length`` fits its context. ``scoring``: it may be a reward model."""
    config = resolved.config
    begin = starting.from_checkpoint(config, starting.model_directory(config), scoring=scoring)
    return fit_max_length(starting.settle_dtype(resolved, device), config.max_length, begin.max_positions), begin


def load_trainable(config: TuneConfig, begin: Start, device: torch.device) -> Decoder:
    """All weights, or fresh adapters on frozen ones."""
    if config.has_adapter:
        return starting.load_with_adapter(config, config, begin, device)
    return starting.load_whole(config, begin, device)


def weights_of(config: TuneConfig, begin: Start, tokenizer: Tokenizer) -> Weights:
    """An adapter's files, or a model's."""
    return weights.adapter(begin.base, tokenizer) if config.has_adapter else weights.whole_model(tokenizer)


def plan(config: RowsConfig, *, alone: str) -> str:
    """The rows of a step; ``alone``: what a row holds where rows are not packed."""
    length = f"{config.max_length:,} tokens, packed" if config.zero_padding else f"one {alone} each"
    count = (config.per_device_train_batch_size or 1) * config.gradient_accumulation_steps
    return f"{count} {'row' if count == 1 else 'rows'} ({length})"


def tokens_per_pass(config: RowsConfig) -> int:
    """The most tokens that go through the model at once."""
    return (config.per_device_train_batch_size or 1) * config.max_length


def say_next(config: TuneConfig, result: training.TrainResult, console: Console) -> None:
    """What to do with the run, where it trained."""
    if not config.do_train:
        return
    console.print(f"next:   oarsmith chat {result.output_dir}")
    if config.has_adapter and config.adapter_type not in UNMERGEABLE:
        console.print(f"        oarsmith merge-adapter {result.output_dir} MERGED   (a plain model, with proof)")
