"""Which keys a query may see, as spans of a token stream; and the cache that carries state between calls.

Shapes: T tokens of this call, S slots of keys and values, N sequences of the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from oarsmith.models.cache_form import CacheForm
from oarsmith.models.rounded_slots import RoundedSlots, rounded_slots


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
class RowPlaces:
    """Rows that lie beside one another, each with places of its own (see ``rows.py``).

    ``positions_BT``: where each token goes in its row; ``size``: places of a row.
    """

    positions_BT: Tensor
    size: int


@dataclass(frozen=True)
class Branches:
    """Documents that share their beginnings, as the whole documents that they stand for.

    A prompt with two answers lies in the stream once: prompt, first answer, second answer. What looks at other tokens
    (attention, filters) works on the whole documents, prompt and first answer, prompt and second answer; everything
    else on the stream. Shapes: E tokens of the whole documents.

    Attributes:
        source_E: which token of the stream each of their tokens is.
        own_T: where in them each token of the stream lies; of one that lies in several, the first.
        layout: theirs.
    """

    source_E: Tensor
    own_T: Tensor
    layout: Layout


@dataclass(frozen=True)
class Layout:
    """One call: its documents, who sees whom, and each token's position.

    ``lengths_T``: how far the positions of a token's document reached when the token came, the highest plus 1: its
    number of tokens then, unless positions skip. ``prompts_T``: the number of tokens that came with the document's
    first one. ``blocks_T``: the second row of positions, where the model has two. ``ranges``: where a cache holds the
    keys that the spans count one after another (first key, end of keys, slot of the first); None: key i is token i of
    this call. ``halves``: spans of the first half of the heads and of the second, where they differ (see
    ``shifted.py``). ``rows``: in place of spans and pieces. ``branches``: in place of both, where documents share
    beginnings.
    """

    pieces: tuple[Piece, ...]
    spans: tuple[Span, ...]
    positions_T: Tensor
    lengths_T: Tensor
    prompts_T: Tensor
    blocks_T: Tensor | None = None
    ranges: tuple[tuple[int, int, int], ...] | None = None
    halves: tuple[tuple[Span, ...], tuple[Span, ...]] | None = None
    rows: RowPlaces | None = None
    front: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    asked: tuple[int, ...] | None = None
    branches: Branches | None = None

    @property
    def fresh(self) -> bool:
        """Whether all documents begin in this call."""
        return self.rows is None and all(piece.old == 0 for piece in self.pieces)

    @property
    def most_keys(self) -> int:
        """The most keys that a query may see, or as many that it is not known."""
        if self.branches is not None:
            return self.branches.layout.most_keys
        return max((s.k_stop - s.k_start for s in self.spans), default=0) if self.rows is None else self.rows.size

    @property
    def sizes_T(self) -> Tensor:
        """How many tokens of this call each token's document has, itself included."""
        if self.branches is not None:
            return self.branches.layout.sizes_T[self.branches.own_T]
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

    def asking(self, asked: Sequence[int]) -> Layout:
        """The layout with the number of tokens of each document that are its prompt."""
        return replace(self, asked=tuple(asked))

    @staticmethod
    def branching(bounds_E: Sequence[int], source_E: Tensor) -> Layout:
        """Documents that share beginnings (``Branches``). ``source_E``: which token of the stream each of theirs is.

        Every token of the stream is some document's, and has the same tokens before it in all of them.
        """
        index_E = torch.arange(len(source_E), device=source_E.device)
        sizes = torch.tensor([b - a for a, b in pairwise(bounds_E)], device=source_E.device)
        starts = torch.tensor(bounds_E[:-1], device=source_E.device)
        whole = Layout.documents(bounds_E, index_E - starts.repeat_interleave(sizes))
        if torch.equal(source_E, index_E):  # nothing is shared
            return whole
        first_T = torch.full((int(source_E.max()) + 1,), len(source_E), device=source_E.device)
        own_T = first_T.scatter_reduce(0, source_E, index_E, "amin")
        return Layout._of_branches(Branches(source_E, own_T, whole))

    @staticmethod
    def _of_branches(branches: Branches) -> Layout:
        whole, own_T = branches.layout, branches.own_T
        return Layout(
            (),
            (),
            whole.positions_T[own_T],
            whole.lengths_T[own_T],
            whole.prompts_T[own_T],
            None if whole.blocks_T is None else whole.blocks_T[own_T],
            branches=branches,
        )

    def with_whole(self, change: Callable[[Layout], Layout]) -> Layout:
        """What ``change`` makes of it, or of its whole documents."""
        if self.branches is None:
            return change(self)
        return Layout._of_branches(replace(self.branches, layout=change(self.branches.layout)))

    def followed_by(self, count: int) -> Layout:
        """The layout with one more document of ``count`` tokens at its end."""
        assert self.fresh, "without a cache only"
        start = len(self.positions_T)
        if (before := self.branches) is not None:
            index = torch.arange(count, device=before.source_E.device)
            source_E = torch.cat([before.source_E, start + index])
            own_T = torch.cat([before.own_T, len(before.source_E) + index])
            return Layout._of_branches(Branches(source_E, own_T, before.layout.followed_by(count)))
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


class Cache(Protocol):
    """What a layer does with a cache."""

    def write(self, layer: int, *new: Tensor) -> list[Tensor]:
        """Store this call's tensors of a layer; of each, what the layout points into."""

    def state(self, layer: int) -> Tensor:
        """The layer's state [N, ...], to be read and written in place."""


class KVCache:
    """What attention keeps of ``num_sequences`` sequences: keys and values in pages of ``block_size`` tokens.

    Which pages hold which sequence is decided outside: ``pages`` is the table. A page may stand in several sequences
    as long as none of them writes to it. ``form``: how keys and values are kept in 8 bits, if they are; the call's own
    are read rounded too.

    Attributes:
        pages: the pages of each sequence, in the order of its tokens; -1 for those that no token sees any more.
        used: tokens of each sequence so far; set one to 0 to give its row to another.
        marks: what the visibility rule remembers of each sequence (see ``visibility.py``).
    """

    def __init__(
        self,
        shapes: Sequence[CacheShape],
        *,
        num_sequences: int,
        num_pages: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        form: CacheForm | None = None,
    ) -> None:
        self.block_size = block_size
        self.pages: list[list[int]] = [[] for _ in range(num_sequences)]
        self.used = [0] * num_sequences
        self.marks: list[tuple[int, ...]] = [()] * num_sequences
        self._prompts = [0] * num_sequences
        size = num_pages * block_size

        def empty(*shape: int) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device=device)

        self._slots: list[list[Tensor]] = []
        self._rounded: list[list[RoundedSlots]] = []
        if form is not None:
            self._rounded = [
                [rounded_slots(form, layer, place, size, slot, device) for place, slot in enumerate(shape.slots)]
                for layer, shape in enumerate(shapes)
            ]
        else:
            self._slots = [[empty(size, *slot) for slot in shape.slots] for shape in shapes]
        self._states = [None if shape.state is None else empty(num_sequences, *shape.state) for shape in shapes]
        self._device = device
        self._chosen = torch.empty(0, dtype=torch.int64, device=device)
        self._ranges: tuple[tuple[int, int, int], ...] | None = None
        self._seen = self._chosen

    def extend(
        self, counts: Sequence[int], sequences: Sequence[int] | None = None, prompts: Sequence[int] | None = None
    ) -> Layout:
        """The layout of a call that brings ``counts[i]`` new tokens of ``sequences[i]`` (all, in order, by default).

        The tokens of the next decoder call must lie in this order, sequence after sequence, and pages for them must be
        in the table.

        Args:
            prompts: the length of each sequence's prompt, where it may come in several calls: rotations that follow the
                length of the document take all of it at once. Not given: what the first call brings.
        """
        chosen = list(range(len(self.used)) if sequences is None else sequences)
        olds = [self.used[sequence] for sequence in chosen]
        pieces, start = [], 0
        positions: list[int] = []
        lengths: list[int] = []
        sizes: list[int] = []
        for index, (sequence, old, count) in enumerate(zip(chosen, olds, counts, strict=True)):
            stop = old + count
            assert stop <= len(self.pages[sequence]) * self.block_size, (stop, self.pages[sequence], self.block_size)
            if old == 0:
                self.marks[sequence] = ()
            if prompts is not None or old == 0:
                self._prompts[sequence] = count if prompts is None else prompts[index]
            pieces.append(Piece(start, start + count, old, sequence))
            prompt = self._prompts[sequence]
            positions += range(old, stop)
            lengths += [max(at, prompt) for at in range(old + 1, stop + 1)]
            sizes += [prompt] * count
            self.used[sequence] = stop
            start += count
        spans, ranges = self._place(pieces)
        if self._rounded:
            # What is seen is made anew in each layer, and in the order in which the spans count it.
            self._seen, ranges = self._chosen if ranges is None else self._slots_in(ranges), None
        where, length, prompt_T = (self._tensor(values) for values in (positions, lengths, sizes))
        return Layout(tuple(pieces), tuple(spans), where, length, prompt_T, ranges=ranges)

    def _place(self, pieces: Sequence[Piece]) -> tuple[list[Span], tuple[tuple[int, int, int], ...] | None]:
        """The call's spans, and where the keys lie that they count. Without old keys those are the call's own."""
        chosen = [slot for piece in pieces for slot in self._slots_of(piece)]
        self._chosen = self._tensor(chosen)
        if all(piece.old == 0 for piece in pieces):
            self._ranges = None
            return [Span(piece.start, piece.stop, piece.start, piece.stop) for piece in pieces], None
        spans: list[Span] = []
        ranges: list[tuple[int, int, int]] = []
        key, size = 0, self.block_size
        for piece in pieces:
            # Pages that nobody sees any more are gone (-1): keys are counted from the first that is there.
            end, gone = piece.old + piece.stop - piece.start, self._num_gone(piece.sequence) * size
            spans.append(Span(piece.start, piece.stop, key, key + end - gone))
            key -= gone
            for start in range(gone, end, size):
                slot, stop = self.pages[piece.sequence][start // size] * size, min(start + size, end)
                first, last, before = ranges[-1] if start > gone else (0, 0, 0)
                if start > gone and before + last - first == slot:  # pages side by side are one range
                    ranges[-1] = (first, key + stop, before)
                else:
                    ranges.append((key + start, key + stop, slot))
            key += end
        self._ranges = tuple(ranges)
        return spans, self._ranges

    def _slots_in(self, ranges: Sequence[tuple[int, int, int]]) -> Tensor:
        pieces = [torch.arange(slot, slot + stop - start, device=self._device) for start, stop, slot in ranges]
        return torch.cat(pieces)

    def _num_gone(self, sequence: int) -> int:
        return next((at for at, page in enumerate(self.pages[sequence]) if page >= 0), 0)

    def _slots_of(self, piece: Piece) -> Iterator[int]:
        """Where the tokens of a piece go."""
        pages, size = self.pages[piece.sequence], self.block_size
        start, stop = piece.old, piece.old + piece.stop - piece.start
        while start < stop:
            end = min(stop, (start // size + 1) * size)
            slot = pages[start // size] * size + start % size
            yield from range(slot, slot + end - start)
            start = end

    def write(self, layer: int, *new: Tensor) -> list[Tensor]:
        """Store this call's tensors [T, ...] of a layer; of each, what the layout's spans and ranges point into.

        Those are the call's own tensors where all documents begin in it, else all slots [S, ...].
        """
        if self._rounded:
            for rounded, value in zip(self._rounded[layer], new, strict=True):
                rounded.write(self._chosen, value)
            return [x.read(self._seen, value.dtype) for x, value in zip(self._rounded[layer], new, strict=True)]
        stores = self._slots[layer]
        values = [value.to(store.dtype) for value, store in zip(new, stores, strict=True)]
        for store, value in zip(stores, values, strict=True):
            store.index_copy_(0, self._chosen, value)
        return values if self._ranges is None else stores

    def state(self, layer: int) -> Tensor:
        """The layer's state [N, ...], to be read and written in place."""
        state = self._states[layer]
        assert state is not None, layer
        return state

    def copy_page(self, source: int, target: int) -> None:
        """Make ``target`` hold what ``source`` holds."""
        size = self.block_size
        for store in (store for stores in self._slots for store in stores):
            store[target * size : (target + 1) * size] = store[source * size : (source + 1) * size]
        for rounded in (x for stores in self._rounded for x in stores):
            rounded.copy(slice(source * size, (source + 1) * size), slice(target * size, (target + 1) * size))

    def copy_sequence(self, source: int, target: int) -> None:
        """Let row ``target`` go on from where row ``source`` is; its pages are the caller's affair."""
        self.used[target], self.marks[target] = self.used[source], self.marks[source]
        self._prompts[target] = self._prompts[source]
        for state in self._states:
            if state is not None:
                state[target] = state[source]

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).to(self._device)
