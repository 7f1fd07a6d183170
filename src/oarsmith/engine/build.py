"""What an engine is made of: its model, its sizes, and the runner that follows from them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from oarsmith.engine.backend import Backend, DecoderBackend
from oarsmith.engine.draft_model import ModelDrafter
from oarsmith.engine.memory import default_num_pages
from oarsmith.engine.pages import PagePool
from oarsmith.engine.runner import Runner
from oarsmith.engine.scheduler import Scheduler
from oarsmith.engine.speculation import Drafter, NgramDrafter
from oarsmith.errors import ConfigError, ModelError
from oarsmith.loading import load_model
from oarsmith.model_path import find_tokenizer, resolve
from oarsmith.models.caching import CacheRules
from oarsmith.models.decoder import Decoder
from oarsmith.text import Tokenizer, load_tokenizer
from oarsmith.training.precision import has_fast_bf16

NGRAM = "ngram"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What an engine has room for; see ``Engine``. ``tokens_each``: most tokens that an answer brings to a step.

    Raises:
        ConfigError: a size below the least.
    """

    batch_size: int
    num_pages: int | None
    block_size: int
    max_step_tokens: int
    prefix_caching: bool
    tokens_each: int

    def __post_init__(self) -> None:
        step = max(self.batch_size, 1) * self.tokens_each
        least = {"batch_size": 1, "num_pages": 1, "block_size": 1, "max_step_tokens": step}
        for name, limit in least.items():
            value = getattr(self, name)
            if value is not None and value < limit:
                what = f"{name} is {value}"
                if name == "max_step_tokens":
                    what += f", and {self.batch_size} answers bring up to {self.tokens_each} tokens each to a step"
                raise ConfigError(what, where=name, fix=f"{name} must be at least {limit}")


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


@dataclass(frozen=True, kw_only=True)
class Speculation:
    """Who guesses tokens, and how many at a time; see ``Engine``.

    Raises:
        ConfigError: no tokens, or likenesses of no length.
    """

    by: str | Path | Decoder | None
    num_draft_tokens: int
    ngram_min: int
    ngram_max: int

    def __post_init__(self) -> None:
        least = {"num_draft_tokens": 1, "ngram_min": 1, "ngram_max": max(self.ngram_min, 1)}
        for name, limit in least.items():
            value = getattr(self, name)
            if value < limit:
                raise ConfigError(f"{name} is {value}", where=name, fix=f"{name} must be at least {limit}")


def open_draft_model(speculation: Speculation, model: Decoder, tokenizer: Tokenizer | None) -> Decoder | None:
    """The model that guesses, if one does.

    Raises:
        OarsmithError: it cannot be loaded, its tokens are others, or one of the two models cannot take tokens back.
    """
    if speculation.by is None:
        return None
    if not CacheRules.of(model.spec).revocable:
        what = "this model remembers more of a token than its keys, so guesses could not be taken back"
        raise ConfigError(what, where="speculative", fix="leave speculative out")
    if speculation.by == NGRAM:
        return None
    if isinstance(speculation.by, Decoder):
        draft, own = speculation.by, None
    else:
        draft = load_model(speculation.by, dtype=model.embedding.weight.dtype, device=model.device)
        where = resolve(speculation.by)
        own = load_tokenizer(where.base) if (where.base / "tokenizer_config.json").is_file() else None
    rules = CacheRules.of(draft.spec)
    if draft.training or not rules.revocable or rules.reread_after is not None:
        what = "the draft model is in training mode" if draft.training else "a draft model of this kind cannot guess"
        raise ConfigError(what, where="speculative", fix="take another one, in eval mode")
    same = draft.spec.vocab_size == model.spec.vocab_size
    if own is not None and tokenizer is not None:
        shared = min(own.vocab_size, tokenizer.vocab_size)
        same = all(own.id_to_token(index) == tokenizer.id_to_token(index) for index in range(shared))
    if not same:
        what = "the draft model has another vocabulary than the model"
        raise ConfigError(what, where="speculative", fix="take one with the same tokenizer")
    return draft


@torch.inference_mode()
def build_runner(model: Decoder, sizes: Sizes, speculation: Speculation, draft: Decoder | None) -> Runner:
    """The cache and what fills it."""
    models = [model] if draft is None else [model, draft]
    num_pages = sizes.num_pages
    if num_pages is None:
        num_pages = default_num_pages(models, sizes.batch_size, sizes.block_size)
    backend, *others = [_backend(each, sizes, num_pages) for each in models]
    drafter: Drafter | None = None
    if draft is not None:
        drafter = ModelDrafter(others[0], draft.spec, model.spec.vocab_size)
    elif speculation.by is not None:
        drafter = NgramDrafter(speculation.ngram_min, speculation.ngram_max)
    rules = CacheRules.of(model.spec)
    if draft is not None:
        also = CacheRules.of(draft.spec)
        whole = rules.whole_prompt or also.whole_prompt
        rules = replace(rules, prefixes=rules.prefixes and also.prefixes, whole_prompt=whole)
    scheduler = Scheduler(
        PagePool(num_pages, sizes.block_size),
        rules,
        max_running=sizes.batch_size,
        max_step_tokens=sizes.max_step_tokens,
        prefixes=sizes.prefix_caching,
        followed=draft is not None,
    )
    return Runner(backend, scheduler, drafter)


def _backend(model: Decoder, sizes: Sizes, num_pages: int) -> Backend:
    return DecoderBackend(model, model.new_cache(sizes.batch_size, sizes.block_size, num_pages))
