"""Virtual tokens in front of every document of a call (see ``part.py``).

Shapes: T tokens of the stream, S key slots, P virtual tokens, G kv heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from oarsmith.models.layout import Layout
from oarsmith.models.part import KeysAndValues
from oarsmith.models.virtual import virtual_ids


def put_before(ids_T: Tensor, layout: Layout, count: int) -> tuple[Tensor, Layout, Tensor]:
    """A call of whole documents with ``count`` virtual tokens before each; and where its own tokens are in it."""
    assert layout.fresh and layout.halves is None, "documents as they come"
    device = ids_T.device
    virtual_P = torch.tensor(virtual_ids(count), device=device)
    place_P = torch.arange(count, device=device)
    ids, positions, own, bounds = [], [], [], [0]
    for piece in layout.pieces:
        ids += [virtual_P, ids_T[piece.start : piece.stop]]
        positions += [place_P, layout.positions_T[piece.start : piece.stop] + count]
        first = bounds[-1] + count
        bounds.append(first + piece.stop - piece.start)
        own.append(torch.arange(first, bounds[-1], device=device))
    asked = None if layout.asked is None else tuple(size + count for size in layout.asked)
    led = replace(Layout.documents(bounds, torch.cat(positions)), asked=asked)
    return torch.cat(ids), led, torch.cat(own)


def moved(layout: Layout, count: int) -> Layout:
    """The layout with the first positions of every document left to virtual tokens that are not in the stream."""
    assert layout.halves is None, "groups of a document's tokens do not all see its virtual tokens"
    return replace(
        layout,
        positions_T=layout.positions_T + count,
        lengths_T=layout.lengths_T + count,
        prompts_T=layout.prompts_T + count,
    )


def with_keys(layout: Layout, layers: Sequence[KeysAndValues]) -> Layout:
    """The layout of a call of whole documents, each of which sees these keys and values before its own."""
    assert layout.fresh and layout.ranges is None, "without a cache"
    count, spans, index, at = len(layers[0][0]), [], [], 0
    device = layout.positions_T.device
    first_P = torch.arange(count, device=device)
    for span in layout.spans:
        size = span.k_stop - span.k_start
        prefix = span.prefix + count if span.prefix else 0
        spans.append(replace(span, k_start=at, k_stop=at + count + size, prefix=prefix))
        index += [first_P, torch.arange(count + span.k_start, count + span.k_stop, device=device)]
        at += count + size
    return replace(layout, spans=tuple(spans), front=Before(layers, torch.cat(index)))


def instead_of_own(layout: Layout, ids_T: Tensor, layers: Sequence[KeysAndValues]) -> Layout:
    """The layout of a call with a cache, whose virtual tokens have these keys and values."""
    count = len(layers[0][0])
    if all(piece.old >= count for piece in layout.pieces):
        return layout
    return replace(layout, front=Instead(layers, ids_T < 0, (-1 - ids_T).clamp_min(0)))


@dataclass(frozen=True, eq=False)
class Before:
    """Keys and values before those of each document. ``index_S``: each slot among them and the call's own."""

    layers: Sequence[KeysAndValues]
    index_S: Tensor

    def __call__(self, layer: int, k_TGK: Tensor, v_TGK: Tensor) -> KeysAndValues:
        keys, values = (x.to(k_TGK.dtype) for x in self.layers[layer])
        return torch.cat((keys, k_TGK))[self.index_S], torch.cat((values, v_TGK))[self.index_S]


@dataclass(frozen=True, eq=False)
class Instead:
    """Keys and values in place of those that some tokens have. ``which_T``: the number of each of those."""

    layers: Sequence[KeysAndValues]
    virtual_T: Tensor
    which_T: Tensor

    def __call__(self, layer: int, k_TGK: Tensor, v_TGK: Tensor) -> KeysAndValues:
        virtual_T11 = self.virtual_T[:, None, None]
        keys, values = (x.to(k_TGK.dtype)[self.which_T] for x in self.layers[layer])
        return torch.where(virtual_T11, keys, k_TGK), torch.where(virtual_T11, values, v_TGK)
