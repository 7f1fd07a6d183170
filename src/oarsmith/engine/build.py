"""What an engine is made of: its model, its sizes, and the runner that follows from them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from oarsmith.engine.backend import DecoderBackend
from oarsmith.engine.memory import default_num_pages
from oarsmith.engine.pages import PagePool
from oarsmith.engine.runner import Runner
from oarsmith.engine.scheduler import Scheduler
from oarsmith.errors import ConfigError, ModelError
from oarsmith.loading import load_model
from oarsmith.model_path import find_tokenizer
from oarsmith.models.caching import CacheRules
from oarsmith.models.decoder import Decoder
from oarsmith.text import Tokenizer
from oarsmith.training.precision import has_fast_bf16


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What an engine has room for; see ``Engine``.

    Raises:
        ConfigError: a size below the least.
    """

    batch_size: int
    num_pages: int | None
    block_size: int
    max_step_tokens: int
    prefix_caching: bool

    def __post_init__(self) -> None:
        least = {"batch_size": 1, "num_pages": 1, "block_size": 1, "max_step_tokens": max(self.batch_size, 1)}
        for name, limit in least.items():
            value = getattr(self, name)
            if value is not None and value < limit:
                raise ConfigError(f"{name} is {value}", where=name, fix=f"{name} must be at least {limit}")


def open_model(
    model: str | Path | Decoder, tokenizer: Tokenizer | None, dtype: str, device: str, adapter: str | Path | None
) -> tuple[Decoder, Tokenizer | None]:
    """An engine's model and tokenizer; see ``Engine``.

    Raises:
        OarsmithError: a path that cannot be loaded, options of a path beside a decoder, a decoder in training mode.
    """
    if not isinstance(model, Decoder):
        found = find_tokenizer(model, adapter) if tokenizer is None else tokenizer
        return _load(model, dtype, device, adapter), found
    if (dtype, device, adapter) != ("auto", "auto", None):
        what = "dtype, device and adapter belong to a path, not to a model that is loaded already"
        raise ConfigError(what, fix="give them to load_model")
    if model.training:
        raise ModelError("the model is in training mode (dropout changes answers)", fix="call model.eval()")
    return model, tokenizer


def _load(path: str | Path, dtype: str, device: str, adapter: str | Path | None) -> Decoder:
    model = load_model(path, dtype=dtype, device=device, adapter=adapter)
    weight = model.embedding.weight
    native = weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and has_fast_bf16(weight.device))
    if dtype == "auto" and weight.device.type == "cpu" and not native:
        model.float()
    return model


@torch.inference_mode()
def build_runner(model: Decoder, sizes: Sizes) -> Runner:
    """The cache and what fills it."""
    num_pages = sizes.num_pages
    if num_pages is None:
        num_pages = default_num_pages(model, sizes.batch_size, sizes.block_size)
    scheduler = Scheduler(
        PagePool(num_pages, sizes.block_size),
        CacheRules.of(model.spec),
        max_running=sizes.batch_size,
        max_step_tokens=sizes.max_step_tokens,
        prefixes=sizes.prefix_caching,
    )
    cache = model.new_cache(sizes.batch_size, sizes.block_size, num_pages)
    return Runner(DecoderBackend(model, cache), scheduler)
