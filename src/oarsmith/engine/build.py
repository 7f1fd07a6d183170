"""What an engine is made of where PyTorch computes: its decoder, the one that guesses, the caches."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from oarsmith.adapters.bank import AdapterBank
from oarsmith.engine.adapted import AdaptedBackend
from oarsmith.engine.backend import Backend
from oarsmith.engine.decoder_backend import DecoderBackend
from oarsmith.engine.draft_model import ModelDrafter
from oarsmith.engine.memory import free_memory_of, page_bytes
from oarsmith.engine.options import Sizes, Speculation
from oarsmith.engine.runner import Runner
from oarsmith.engine.running import make_runner, native_runner, ngram_drafter
from oarsmith.errors import ConfigError
from oarsmith.loading import load_model
from oarsmith.model_path import resolve
from oarsmith.models.caching import CacheRules
from oarsmith.models.decoder import Decoder
from oarsmith.models.layout import KVCache
from oarsmith.text import Tokenizer, load_tokenizer
from oarsmith.training.precision import has_fast_bf16

if TYPE_CHECKING:
    from oarsmith.engine.served import Served


def load_decoder(path: str | Path, dtype: str, device: str, adapter: str | Path | None) -> Decoder:
    """An engine's decoder; ``auto`` is what the files hold, but float32 where the device would have to emulate that."""
    model = load_model(path, dtype=dtype, device=device, adapter=adapter)
    weight = model.embedding.weight
    fast = weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and has_fast_bf16(weight.device))
    if dtype == "auto" and weight.device.type == "cpu" and not fast:
        model.float()
    return model


def open_draft_model(by: str | Path | Decoder, model: Decoder, tokenizer: Tokenizer | None) -> Decoder:
    """The model that guesses.

    Raises:
        OarsmithError: it cannot be loaded, its tokens are others, or it cannot take tokens back.
    """
    if isinstance(by, Decoder):
        draft, own = by, None
    else:
        draft = load_model(by, dtype=model.embedding.weight.dtype, device=model.device)
        where = resolve(by)
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
def build_runner(
    served: Served, bank: AdapterBank | None, sizes: Sizes, speculation: Speculation, draft: Decoder | None
) -> Runner:
    """The cache and what fills it. ``bank``: of adapters that requests may choose; PyTorch computes them."""
    native = served.native if bank is None else None
    if native is not None and draft is None:
        return native_runner(native, sizes, speculation)
    models = [served.decoder] if draft is None else [served.decoder, draft]
    page, free = page_bytes(models, sizes.block_size, sizes.rounded_cache), free_memory_of(served.decoder.device)
    num_pages = sizes.pages(served.facts.max_positions, page, free)

    def cache(model: Decoder) -> KVCache:
        return model.new_cache(sizes.batch_size, sizes.block_size, num_pages, rounded=sizes.rounded_cache)

    backend: Backend
    if native is not None:
        backend = native.backend(sizes.batch_size, num_pages, sizes.block_size, rounded_cache=sizes.rounded_cache)
    elif bank is not None:
        backend = AdaptedBackend(bank, cache(served.decoder))
    else:
        backend = DecoderBackend(served.decoder, cache(served.decoder))
    drafter, rules = ngram_drafter(speculation), served.facts.rules
    if draft is not None:
        drafter = ModelDrafter(DecoderBackend(draft, cache(draft)), draft.spec, served.facts.vocab_size)
        rules = rules.joined(CacheRules.of(draft.spec))
    gpu = native is None and served.decoder.device.type == "cuda"
    return make_runner(backend, rules, num_pages, sizes, drafter, gpu=gpu)
