"""Which keys a query may see, as spans of a token stream; and the cache that carries state between calls.

Shapes: T tokens of this call, S slots of the key/value store, N sequences of the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """Queries [q_start, q_stop) see keys [k_start, k_stop) causally; the last query is aligned with the last key.

    The first ``prefix`` keys are seen by all queries of the span.
    """

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    prefix: int = 0


@dataclass(frozen=True)
class Piece:
    """Tokens [start, stop) of the stream continue a document of which ``old`` tokens came in earlier calls.

    ``sequence`` is its row in the cache (its number, without one).
    """

    start: int
    stop: int
    old: int
    sequence: int


@dataclass(frozen=True)
class Layout:
    """One call: its documents, who sees whom, and each token's position.

    ``lengths_T``: how far the positions of a token's document reach by now, the highest plus 1: its number of tokens,
    unless positions skip. ``prompts_T``: the number of tokens it had after its first call. ``blocks_T``: the second
    row of positions, where the model has two. ``halves``: spans of the first half of the heads and of the second,
    where they differ (see ``shifted.py``).
    """

    pieces: tuple[Piece, ...]
    spans: tuple[Span, ...]
    positions_T: Tensor
    lengths_T: Tensor
    prompts_T: Tensor
    blocks_T: Tensor | None = None
    halves: tuple[tuple[Span, ...], tuple[Span, ...]] | None = None

    @property
    def fresh(self) -> bool:
        """Whether all documents begin in this call."""
        return all(piece.old == 0 for piece in self.pieces)

    @property
    def sizes_T(self) -> Tensor:
        """How many tokens of this call each token's document has, itself included."""
        sizes = torch.tensor([piece.stop - piece.start for piece in self.pieces], device=self.positions_T.device)
        return sizes.repeat_interleave(sizes)

    @staticmethod
    def documents(bounds: Sequence[int], positions_T: Tensor) -> Layout:
        """Documents that lie one after another and cannot see each other. ``bounds`` runs from 0 to T."""
        assert bounds[0] == 0 and bounds[-1] == positions_T.shape[0], (bounds, positions_T.shape)
        pieces = tuple(Piece(a, b, 0, index) for index, (a, b) in enumerate(pairwise(bounds)))
        spans = tuple(Span(a, b, a, b) for a, b in pairwise(bounds))
        sizes = torch.tensor([b - a for a, b in pairwise(bounds)], device=positions_T.device)
        document_T = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)
        highest = torch.zeros_like(sizes).scatter_reduce(0, document_T, positions_T, "amax")
        return Layout(pieces, spans, positions_T, highest[document_T] + 1, sizes[document_T])

    def followed_by(self, count: int) -> Layout:
        """The layout with one more document of ``count`` tokens at its end."""
        assert self.fresh, "without a cache only"
        start = len(self.positions_T)
        span = Span(start, start + count, start, start + count)
        index_T = torch.arange(count, device=self.positions_T.device)
        size_T = torch.full_like(index_T, count)
        return replace(
            self,
            pieces=(*self.pieces, Piece(start, start + count, 0, len(self.pieces))),
            spans=(*self.spans, span),
            positions_T=torch.cat([self.positions_T, index_T]),
            lengths_T=torch.cat([self.lengths_T, size_T]),
            prompts_T=torch.cat([self.prompts_T, size_T]),
            blocks_T=None if self.blocks_T is None else torch.cat([self.blocks_T, torch.zeros_like(index_T)]),
            halves=None if self.halves is None else ((*self.halves[0], span), (*self.halves[1], span)),
        )


@dataclass(frozen=True)
class CacheShape:
    """What one layer keeps: ``slots``, a shape for each tensor kept per token; ``state``, one kept per sequence."""

    slots: tuple[tuple[int, ...], ...]
    state: tuple[int, ...] | None = None


class KVCache:
    """What attention keeps of ``num_sequences`` sequences, each with its own contiguous room of ``capacity`` tokens.

    Attributes:
        used: tokens of each sequence so far; set one to 0 to give its room to another.
        marks: what the visibility rule remembers of each sequence (see ``visibility.py``).
    """

    def __init__(
        self,
        shapes: Sequence[CacheShape],
        *,
        num_sequences: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.capacity = capacity
        self.used = [0] * num_sequences
        self.marks: list[tuple[int, ...]] = [()] * num_sequences
        self._prompts = [0] * num_sequences
        size = num_sequences * capacity

        def empty(*shape: int) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device=device)

        self._slots = [[empty(size, *slot) for slot in shape.slots] for shape in shapes]
        self._states = [None if shape.state is None else empty(num_sequences, *shape.state) for shape in shapes]
        self._chosen = torch.empty(0, dtype=torch.int64, device=device)

    def extend(self, counts: Sequence[int], sequences: Sequence[int] | None = None) -> Layout:
        """Make room for ``counts[i]`` new tokens of ``sequences[i]`` (all, in order, by default); their layout.

        The tokens of the next decoder call must lie in this order, sequence after sequence.
        """
        chosen = range(len(self.used)) if sequences is None else sequences
        pieces, spans, slots, start = [], [], [], 0
        positions, lengths, prompts = [], [], []
        for sequence, count in zip(chosen, counts, strict=True):
            old, room = self.used[sequence], sequence * self.capacity
            assert old + count <= self.capacity, (old, count, self.capacity)
            if old == 0:
                self.marks[sequence], self._prompts[sequence] = (), count
            pieces.append(Piece(start, start + count, old, sequence))
            spans.append(Span(start, start + count, room, room + old + count))
            positions.append(torch.arange(old, old + count))
            lengths.append(torch.full((count,), old + count))
            prompts.append(torch.full((count,), self._prompts[sequence]))
            slots.append(torch.arange(room + old, room + old + count))
            self.used[sequence] = old + count
            start += count
        device = self._chosen.device
        self._chosen = torch.cat(slots).to(device)
        where, length, prompt = (torch.cat(parts).to(device) for parts in (positions, lengths, prompts))
        return Layout(tuple(pieces), tuple(spans), where, length, prompt)

    def write(self, layer: int, *new: Tensor) -> list[Tensor]:
        """Store this call's tensors [T, ...] of a layer; all slots [S, ...] of each."""
        for store, values in zip(self._slots[layer], new, strict=True):
            store.index_copy_(0, self._chosen, values.to(store.dtype))
        return self._slots[layer]

    def state(self, layer: int) -> Tensor:
        """The layer's state [N, ...], to be read and written in place."""
        state = self._states[layer]
        assert state is not None, layer
        return state
