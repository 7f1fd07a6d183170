"""How large a cache may be where nobody says it."""

from __future__ import annotations

from pathlib import Path

import torch

from oarsmith.models.count import cache_bytes
from oarsmith.models.decoder import Decoder

_MEMORY = Path("/proc/meminfo")
# What a system is taken to have free that does not tell.
_UNKNOWN = 4 << 30


def default_num_pages(model: Decoder, num_sequences: int, block_size: int) -> int:
    """Pages for so many sequences that fill the context, but for no more than half of the memory that is free."""
    needed = num_sequences * -(-model.spec.max_positions // block_size)
    page = cache_bytes(model.spec, block_size, itemsize=model.embedding.weight.element_size(), num_sequences=0)
    return max(min(needed, free_memory(model.device) // 2 // page), 1)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated there."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    if not _MEMORY.exists():
        return _UNKNOWN
    fields = dict(line.split(":", 1) for line in _MEMORY.read_text(encoding="ascii").splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024
