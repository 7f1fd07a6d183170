"""What jobs have in common: threads, kernels and memory; tokenizer and longest sample."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from oarsmith import kernels
from oarsmith.config.base import JobConfig
from oarsmith.config.groups import ModelKeys, RuntimeKeys
from oarsmith.config.resolved import Resolved
from oarsmith.errors import ConfigError
from oarsmith.kernels.memory import keep_freed_memory
from oarsmith.loading import pick_device
from oarsmith.model_path import resolve
from oarsmith.text import Tokenizer, load_tokenizer
from oarsmith.text.choose import with_named_template

C = TypeVar("C", bound=JobConfig)


@contextmanager
def runtime(config: RuntimeKeys) -> Iterator[torch.device]:
    """The device to compute on, with threads and kernels set as configured."""
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    keep_freed_memory(compiled=config.kernels != "torch")
    with kernels.using(config.kernels):
        yield pick_device(config.device)


def make_tokenizer(config: ModelKeys) -> Tokenizer:
    """The tokenizer with the template the config names."""
    tokenizer = load_tokenizer(resolve(config.tokenizer_name_or_path or config.model_name_or_path).base)
    return with_named_template(tokenizer, config.chat_template)


def fit_max_length(resolved: Resolved[C], asked: int, limit: int) -> Resolved[C]:
    """``max_length``, ``asked`` for, within the model's context of ``limit`` tokens: the default shrinks to it.

    Raises:
        ConfigError: a longer one was asked for.
    """
    if asked <= limit:
        return resolved
    origin = resolved.provenance["max_length"]
    if origin == "default":
        return resolved.settle("the model's context", max_length=limit)
    raise ConfigError(
        f"max_length {asked} is longer than the model's context of {limit} tokens",
        where=origin,
        fix=f"set max_length to at most {limit}",
    )
