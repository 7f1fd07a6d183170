"""What an engine is made of where PyTorch computes: its decoder, the one that guesses, the caches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from oarsmith.adapters.bank import AdapterBank
from oarsmith.adapters.forms import AS_STORED
from oarsmith.adapters.linear import Adapt
from oarsmith.checkpoint import hf
from oarsmith.checkpoint.deferred import has_codes
from oarsmith.engine.adapted import AdaptedBackend
from oarsmith.engine.backend import Backend
from oarsmith.engine.decoder_backend import DecoderBackend
from oarsmith.engine.draft_model import ModelDrafter
from oarsmith.engine.memory import free_memory_of, page_bytes
from oarsmith.engine.options import Sizes, Speculation
from oarsmith.engine.runner import Runner
from oarsmith.engine.running import make_runner, native_runner, ngram_drafter
from oarsmith.loading import load_model, pick_device, pick_dtype
from oarsmith.model_path import resolve
from oarsmith.models.decoder import Decoder
from oarsmith.models.families import Family
from oarsmith.models.layout import KVCache
from oarsmith.models.spec import DecoderSpec, rewrite_linears
from oarsmith.models.spec_parts import LinearSpec
from oarsmith.training.precision import has_fast_bf16

if TYPE_CHECKING:
    from oarsmith.engine.served import Served


def load_decoder(
    path: str | Path, dtype: str, device: str, adapter: str | Path | None, *, any_base: bool = False
) -> Decoder:
    """An engine's decoder; ``auto`` is what the files hold, but float32 where the device would have to emulate that."""
    return _emulating_nothing(load_model(path, dtype=dtype, device=device, adapter=adapter, any_base=any_base), dtype)


def load_stored(path: str | Path, dtype: str, device: str, adapter: str | Path | None) -> Decoder | None:
    """The same with the maps of a quantized checkpoint as its codes, which products decode a part at a time.

    None: there are no codes, an adapter goes on top, or it is for a GPU, where that has no kernel of its own.
    """
    where, place = resolve(path, adapter), pick_device(device)
    if where.adapter is not None or place.type != "cpu" or not has_codes(where.base):
        return None
    model = hf.load_decoder(where.base, dtype=pick_dtype(dtype), device=place, rewrite=_as_stored)
    return _emulating_nothing(model.eval().requires_grad_(False), dtype)


def _as_stored(_: Family, spec: DecoderSpec) -> DecoderSpec:
    def rule(path: str, linear: LinearSpec) -> LinearSpec:
        # Latents are attended to through this map's very weight.
        return linear if path.endswith(".kv_up") else replace(linear, rewrite=Adapt(form=AS_STORED))

    return rewrite_linears(spec, rule)


def _emulating_nothing(model: Decoder, dtype: str) -> Decoder:
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
    page = _page_bytes(served, sizes, on_decoder=native is None)
    if draft is not None:
        page += _page_bytes(draft, sizes)
    num_pages = sizes.pages(served.facts.max_positions, page, free_memory_of(device))
    backend: Backend
    if native is None and bank is not None:
        backend = AdaptedBackend(bank, _cache(served, sizes, num_pages))
    else:
        backend = _backend(served, sizes, num_pages)
    drafter, rules = ngram_drafter(speculation), served.facts.rules
    if draft is not None:
        drafter = ModelDrafter(_backend(draft, sizes, num_pages), draft.facts, served.facts.vocab_size)
        rules = rules.joined(draft.facts.rules)
    return make_runner(backend, rules, num_pages, sizes, drafter, gpu=device.type == "cuda")


def _page_bytes(model: Served, sizes: Sizes, *, on_decoder: bool = False) -> int:
    form = sizes.cache_form(model.cache_form)
    if model.native is not None and not on_decoder:
        return model.native.program.page_bytes(sizes.block_size, form=form)
    return page_bytes(model.decoder, sizes.block_size, form)


def _backend(model: Served, sizes: Sizes, num_pages: int) -> Backend:
    if model.native is not None:
        form = sizes.cache_form(model.cache_form)
        return model.native.backend(sizes.batch_size, num_pages, sizes.block_size, form=form)
    return DecoderBackend(model.decoder, _cache(model, sizes, num_pages))


def _cache(model: Served, sizes: Sizes, num_pages: int) -> KVCache:
    form = sizes.cache_form(model.cache_form)
    return model.decoder.new_cache(sizes.batch_size, sizes.block_size, num_pages, form=form)
