"""What an engine is made of where PyTorch computes: its decoder, the one that guesses, the caches."""

from __future__ import annotations

from dataclasses import replace
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
from oarsmith.loading import load_model
from oarsmith.models.decoder import Decoder
from oarsmith.models.layout import KVCache
from oarsmith.training.precision import has_fast_bf16

if TYPE_CHECKING:
    from oarsmith.engine.served import Served


def load_decoder(
    path: str | Path, dtype: str, device: str, adapter: str | Path | None, *, any_base: bool = False
) -> Decoder:
    """An engine's decoder; ``auto`` is what the files hold, but float32 where the device would have to emulate that."""
    model = load_model(path, dtype=dtype, device=device, adapter=adapter, any_base=any_base)
    weight = model.embedding.weight
    fast = weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and has_fast_bf16(weight.device))
    if dtype == "auto" and weight.device.type == "cpu" and not fast:
        model.float()
    return model


@torch.inference_mode()
def build_runner(
    served: Served, bank: AdapterBank | None, sizes: Sizes, speculation: Speculation, draft: Served | None
) -> Runner:
    """The cache and what fills it. ``bank``: of adapters that requests may choose; PyTorch computes them."""
    if served.facts.num_scores is not None:  # nothing is ever in the cache
        sizes = replace(sizes, num_pages=sizes.batch_size)
    native = served.native if bank is None else None
    if native is not None and draft is None:
        return native_runner(native, sizes, speculation)
    device = torch.device("cpu") if native is not None else served.decoder.device
    page = _page_bytes(served if native is not None else served.decoder, sizes)
    if draft is not None:
        page += _page_bytes(draft, sizes)
    num_pages = sizes.pages(served.facts.max_positions, page, free_memory_of(device))
    backend: Backend
    if native is None and bank is not None:
        backend = AdaptedBackend(bank, _cache(served.decoder, sizes, num_pages))
    else:
        backend = _backend(served, sizes, num_pages)
    drafter, rules = ngram_drafter(speculation), served.facts.rules
    if draft is not None:
        drafter = ModelDrafter(_backend(draft, sizes, num_pages), draft.facts, served.facts.vocab_size)
        rules = rules.joined(draft.facts.rules)
    return make_runner(backend, rules, num_pages, sizes, drafter, gpu=device.type == "cuda")


def _page_bytes(model: Served | Decoder, sizes: Sizes) -> int:
    if isinstance(model, Decoder):
        return page_bytes(model, sizes.block_size, sizes.rounded_cache)
    if model.native is not None:
        return model.native.program.page_bytes(sizes.block_size, rounded=sizes.rounded_cache)
    return _page_bytes(model.decoder, sizes)


def _backend(model: Served, sizes: Sizes, num_pages: int) -> Backend:
    if model.native is not None:
        return model.native.backend(sizes.batch_size, num_pages, sizes.block_size, rounded_cache=sizes.rounded_cache)
    return DecoderBackend(model.decoder, _cache(model.decoder, sizes, num_pages))


def _cache(model: Decoder, sizes: Sizes, num_pages: int) -> KVCache:
    return model.new_cache(sizes.batch_size, sizes.block_size, num_pages, rounded=sizes.rounded_cache)
