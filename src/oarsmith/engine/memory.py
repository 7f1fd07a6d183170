"""How large a cache may be where nobody says it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from oarsmith.engine.free_memory import free_memory
from oarsmith.models.count import cache_bytes
from oarsmith.models.decoder import Decoder


def default_num_pages(models: Sequence[Decoder], num_sequences: int, block_size: int) -> int:
    """Pages for so many sequences that fill the context, but for no more than half of the memory that is free.

    Args:
        models: a page holds keys of each; the first one's context counts.
    """
    needed = num_sequences * -(-models[0].spec.max_positions // block_size)
    return max(min(needed, free_memory_of(models[0].device) // 2 // page_bytes(models, block_size)), 1)


def page_bytes(models: Sequence[Decoder], block_size: int) -> int:
    """Memory of a page."""
    sizes = [model.embedding.weight.element_size() for model in models]
    return sum(
        cache_bytes(model.spec, block_size, itemsize=size, num_sequences=0)
        for model, size in zip(models, sizes, strict=True)
    )


def free_memory_of(device: torch.device) -> int:
    """Bytes that can still be allocated there."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return free_memory()
