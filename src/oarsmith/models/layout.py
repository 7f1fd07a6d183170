"""Which keys a query may see, as spans of a token stream; and the cache that carries keys and values between calls.

Shapes: T tokens of this call, S slots of the key/value store, G kv heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """Queries [q_start, q_stop) see keys [k_start, k_stop) causally; the last query is aligned with the last key."""

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int


@dataclass(frozen=True)
class Layout:
    """The spans of one call, with each token's position and the current length of the document it belongs to."""

    spans: tuple[Span, ...]
    positions_T: Tensor
    lengths_T: Tensor

    @staticmethod
    def documents(bounds: Sequence[int], positions_T: Tensor) -> Layout:
        """Documents that lie one after another and cannot see each other. ``bounds`` runs from 0 to T."""
        assert bounds[0] == 0 and bounds[-1] == positions_T.shape[0], (bounds, positions_T.shape)
        spans = tuple(Span(a, b, a, b) for a, b in pairwise(bounds))
        sizes = torch.tensor([b - a for a, b in pairwise(bounds)], device=positions_T.device)
        return Layout(spans, positions_T, sizes.repeat_interleave(sizes))


class KVCache:
    """Keys and values of ``num_sequences`` sequences, each with its own contiguous room of ``capacity`` tokens.

    Args:
        shapes: (num_kv_heads, head_dim) of each layer.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        *,
        num_sequences: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.capacity = capacity
        self.used = [0] * num_sequences
        size = num_sequences * capacity
        self._keys = [torch.empty(size, heads, dim, dtype=dtype, device=device) for heads, dim in shapes]
        self._values = [torch.empty(size, heads, dim, dtype=dtype, device=device) for heads, dim in shapes]
        self._slots = torch.empty(0, dtype=torch.int64, device=device)

    def extend(self, counts: Sequence[int], sequences: Sequence[int] | None = None) -> Layout:
        """Make room for ``counts[i]`` new tokens of ``sequences[i]`` (all, in order, by default); their layout.

        The tokens of the next decoder call must lie in this order, sequence after sequence.
        """
        chosen = range(len(self.used)) if sequences is None else sequences
        spans, positions, lengths, slots, start = [], [], [], [], 0
        for sequence, count in zip(chosen, counts, strict=True):
            old, room = self.used[sequence], sequence * self.capacity
            assert old + count <= self.capacity, (old, count, self.capacity)
            spans.append(Span(start, start + count, room, room + old + count))
            positions.append(torch.arange(old, old + count))
            lengths.append(torch.full((count,), old + count))
            slots.append(torch.arange(room + old, room + old + count))
            self.used[sequence] = old + count
            start += count
        device = self._slots.device
        self._slots = torch.cat(slots).to(device)
        return Layout(tuple(spans), torch.cat(positions).to(device), torch.cat(lengths).to(device))

    def write(self, layer: int, k_TGK: Tensor, v_TGK: Tensor) -> tuple[Tensor, Tensor]:
        """Store this call's keys and values of a layer; all keys and values [S, G, K] of that layer."""
        self._keys[layer].index_copy_(0, self._slots, k_TGK.to(self._keys[layer].dtype))
        self._values[layer].index_copy_(0, self._slots, v_TGK.to(self._values[layer].dtype))
        return self._keys[layer], self._values[layer]
