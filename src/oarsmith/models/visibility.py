"""Visibility rules that depend on the tokens: prefix-LM documents, and documents that end inside the stream.

They turn a layout of plain causal documents into the one the model was trained with. What a rule must remember of a
sequence between calls lies in ``KVCache.marks``. Shapes: T tokens of this call.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from oarsmith.models.layout import KVCache, Layout, Piece, Span
from oarsmith.models.prefix import find_prefix
from oarsmith.models.spec import PrefixLM, ResetAfter


def apply(
    rule: PrefixLM | ResetAfter | None, ids_T: Tensor, layout: Layout, cache: KVCache | None, training: bool
) -> Layout:
    """``layout`` under the model's rule."""
    match rule:
        case None:
            return layout
        case PrefixLM():
            return _prefix_lm(rule, ids_T, layout, cache)
        case ResetAfter(training_only=training_only):
            return _reset(rule, ids_T, layout, cache) if training or not training_only else layout


def _prefix_lm(rule: PrefixLM, ids_T: Tensor, layout: Layout, cache: KVCache | None) -> Layout:
    ids, device = ids_T.tolist(), ids_T.device
    spans, rows, blocks = [], [], []
    for piece, span in zip(layout.pieces, layout.spans, strict=True):
        if piece.old:
            assert cache is not None
            context, frozen = cache.marks[piece.sequence]
        else:
            # A prompt that is read again comes with what was generated after it.
            prompt = int(layout.prompts_T[piece.start]) if piece.stop > piece.start else 0
            context, frozen = find_prefix(rule, ids[piece.start : min(piece.start + prompt, piece.stop)])
            if cache is not None:
                cache.marks[piece.sequence] = (context, frozen)
        index = torch.arange(piece.old, piece.old + piece.stop - piece.start, device=device)
        rows.append(torch.where(index < context, index, frozen))
        blocks.append((index - context + 1).clamp_min(0))
        spans.append(replace(span, prefix=context))
    return replace(layout, spans=tuple(spans), positions_T=torch.cat(rows), blocks_T=torch.cat(blocks))


def _reset(rule: ResetAfter, ids_T: Tensor, layout: Layout, cache: KVCache | None) -> Layout:
    ends = (ids_T == rule.end_id).nonzero()[:, 0].tolist()
    spans: list[Span] = []
    for piece, span in zip(layout.pieces, layout.spans, strict=True):
        begin = cache.marks[piece.sequence][0] if cache is not None and cache.marks[piece.sequence] else 0
        cuts = [at + 1 for at in ends if piece.start <= at < piece.stop]
        spans += _cut(piece, span, begin, cuts)
        if cache is not None and cuts:
            cache.marks[piece.sequence] = (piece.old + cuts[-1] - piece.start,)
    return replace(layout, spans=tuple(spans))


def _cut(piece: Piece, span: Span, begin: int, cuts: list[int]) -> list[Span]:
    """The piece's tokens in groups that end at ``cuts``; the first group sees the document's keys from ``begin`` on."""
    found, first_key = [], span.k_start + begin
    shift = span.k_start + piece.old - piece.start  # key slot of a token of the stream
    for start, stop in zip([piece.start, *cuts], [*cuts, piece.stop], strict=True):
        if start < stop:
            found.append(Span(start, stop, first_key, stop + shift))
        first_key = stop + shift
    return found
