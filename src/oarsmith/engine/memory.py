"""How large a cache may be where nobody says it."""

from __future__ import annotations

import torch

from oarsmith.engine.free_memory import free_memory
from oarsmith.models.cache_form import CacheForm
from oarsmith.models.count import cache_bytes
from oarsmith.models.decoder import Decoder


def page_bytes(model: Decoder, block_size: int, form: CacheForm | None = None) -> int:
    """Memory of a page; ``form``: of a cache in 8 bits."""
    size = model.embedding.weight.element_size()
    return cache_bytes(model.spec, block_size, itemsize=size, num_sequences=0, form=form)


def free_memory_of(device: torch.device) -> int:
    """Bytes that can still be allocated there."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return free_memory()
