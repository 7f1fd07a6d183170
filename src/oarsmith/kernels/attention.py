"""Attention over spans of a token stream.

Shapes: T query tokens, S key slots, H query heads, G kv heads, R = H / G heads that share a kv head, K key dim, V value
dim, L queries of a block, M keys of a block, P positions.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import islice
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from oarsmith.kernels.document_attention import document_attention, document_bounds
from oarsmith.kernels.select import Library, native_for, triton_for

# (first query, end of queries, first key slot, end of key slots, keys that all queries see); beside those, the last
# query sees up to the last key.
SpanBounds = tuple[int, int, int, int, int]

# (first key, end of keys, slot of the first): where keys lie that the spans count one after another.
KeyRange = tuple[int, int, int]

# Keys of a block that lie in more pieces than this are copied together: products of few keys each cost more.
_MAX_PIECES = 4

# Queries per block. Long documents are cut so that the keys above the diagonal are mostly never touched.
BLOCK = 256


class Scores(NamedTuple):
    """What happens to scores q k^T between the product and the softmax.

    Args:
        scale: factor on them.
        window: key j is visible to query i iff 0 <= i - j < window.
        softcap: score -> softcap * tanh(score / softcap).
        bias_HP: fp32; bias[h, key] - bias[h, query] is added, by positions within the span (ALiBi). No gradient.
        sinks_H: each head's score without a key: it takes part in the softmax and carries no value.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    bias_HP: Tensor | None = None
    sinks_H: Tensor | None = None


def attention(
    q_THK: Tensor,
    k_SGK: Tensor,
    v_SGV: Tensor,
    spans: Sequence[SpanBounds],
    scores: Scores,
    ranges: Sequence[KeyRange] | None = None,
) -> Tensor:
    """softmax(scores) v within each span, causal, heads grouped; output [T, H, V].

    Args:
        spans: together they hold every query once. Keys of other spans are invisible.
        ranges: where the keys lie that the spans speak of, in their order; not given: key i is in slot i. No gradient.
    """
    assert scores.softcap is None or scores.bias_HP is None, "no model has both"
    on_gpu = triton_for(q_THK, k_SGK, v_SGV)
    if on_gpu is not None and on_gpu.covers(q_THK, k_SGK, v_SGV, scores):
        out_THV: Tensor = on_gpu.attention(q_THK, k_SGK, v_SGV, spans, scores, ranges)
        return out_THV
    if ranges is not None:
        if native_for(q_THK, k_SGK, v_SGV) is not None:
            return _forward(q_THK, k_SGK, v_SGV, spans, _wide(scores), ranges)[0]
        k_SGK, v_SGV = (gather(x, ranges) for x in (k_SGK, v_SGV))
    elif scores.softcap is None and scores.bias_HP is None and scores.sinks_H is None:
        bounds = document_bounds(q_THK, k_SGK, v_SGV, spans)
        if bounds is not None:
            return document_attention(q_THK, k_SGK, v_SGV, bounds, scale=scores.scale, window=scores.window)
    if ranges is None and native_for(q_THK, k_SGK, v_SGV) is not None:
        return _SpanAttention.apply(q_THK, k_SGK, v_SGV, scores.sinks_H, spans, scores)
    return attention_reference(q_THK, k_SGK, v_SGV, spans, scores)


def gather(x_SGK: Tensor, ranges: Sequence[KeyRange]) -> Tensor:
    """The keys of the ranges, one after another."""
    return torch.cat([x_SGK[slot : slot + stop - start] for start, stop, slot in ranges])


def attention_reference(
    q_THK: Tensor, k_SGK: Tensor, v_SGV: Tensor, spans: Sequence[SpanBounds], scores: Scores
) -> Tensor:
    """The plain twin, span by span: PyTorch's scaled dot product attention, or written out where it cannot say it."""
    outputs = []
    for q0, q1, k0, k1, prefix in spans:
        q, k, v = (x.transpose(0, 1) for x in (q_THK[q0:q1], k_SGK[k0:k1], v_SGV[k0:k1]))
        query = torch.arange(k1 - k0 - (q1 - q0), k1 - k0, device=q.device)[:, None]
        key = torch.arange(k1 - k0, device=q.device)
        visible = (key <= query) | (key < prefix)
        if scores.window is not None:
            visible = visible & (query - key < scores.window)
        plain = scores.softcap is None and scores.bias_HP is None and scores.sinks_H is None
        if plain:
            causal = q1 - q0 == k1 - k0 and scores.window is None and prefix == 0
            mask = None if causal or (q1 - q0 == 1 and scores.window is None) else visible
            out = functional.scaled_dot_product_attention(
                q[None], k[None], v[None], attn_mask=mask, is_causal=causal, scale=scores.scale, enable_gqa=True
            )[0]
        else:
            out = _written_out(q, k, v, visible, query[:, 0], scores)
        outputs.append(out.transpose(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _written_out(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, query: Tensor, scores: Scores) -> Tensor:
    """[H, L, V] of one span from [H, L, K], [G, M, K], [G, M, V]; softmax in fp32."""
    share = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(share, 0), v.repeat_interleave(share, 0)
    s = (q @ k.transpose(1, 2)).float() * scores.scale
    if scores.softcap is not None:
        s = (s / scores.softcap).tanh() * scores.softcap
    if scores.bias_HP is not None:
        s = s + scores.bias_HP[:, None, : k.shape[1]] - scores.bias_HP[:, query, None]
    s = s.masked_fill(~visible, -torch.inf)
    if scores.sinks_H is not None:
        s = torch.cat((s, scores.sinks_H.float()[:, None, None].expand(-1, s.shape[1], 1)), -1)
    p = s.softmax(-1).to(v.dtype)
    return p[..., : k.shape[1]] @ v


class _Block(NamedTuple):
    """Queries [start, stop) against key slots [key_from, key_to) of a span. The rest counts from its first key."""

    start: int
    stop: int
    key_from: int
    key_to: int
    first_query: int
    first_key: int
    prefix: int


def _blocks(span: SpanBounds, window: int | None) -> Iterator[_Block]:
    q0, q1, k0, k1, prefix = span
    if q0 == q1:
        return
    offset = (k1 - k0) - (q1 - q0)
    step = BLOCK if q1 - q0 > BLOCK + BLOCK // 2 else q1 - q0
    for start in range(q0, q1, step):
        stop = min(start + step, q1)
        first = start - q0 + offset
        last_key = max(stop - q0 + offset, min(prefix, k1 - k0))
        first_key = max(first - window + 1, 0) if window is not None else 0
        yield _Block(start, stop, k0 + first_key, k0 + last_key, first, first_key, prefix)


def _fold(x_THK: Tensor, block: _Block, groups: int) -> Tensor:
    """[T, H, K] rows -> [G, R * L, K]: queries that share keys in one matrix."""
    dim = x_THK.shape[-1]
    return x_THK[block.start : block.stop].unflatten(1, (groups, -1)).permute(1, 2, 0, 3).reshape(groups, -1, dim)


def _unfold_into(out_THK: Tensor, block: _Block, x_GNK: Tensor) -> None:
    groups, _, dim = x_GNK.shape
    target = out_THK[block.start : block.stop].unflatten(1, (groups, -1))
    target.copy_(x_GNK.view(groups, -1, block.stop - block.start, dim).permute(2, 0, 1, 3))


class _SpanAttention(torch.autograd.Function):
    """Block by block as batched matrix products; backward recomputes the probabilities from the log-sum-exp.

    On 2 AVX-512 cores this is 2.1x PyTorch's CPU flash attention at these lengths (forward and backward, bf16).
    """

    @staticmethod
    def forward(
        ctx: Any,
        q_THK: Tensor,
        k_SGK: Tensor,
        v_SGV: Tensor,
        sinks_H: Tensor | None,
        spans: Sequence[SpanBounds],
        scores: Scores,
    ) -> Tensor:
        scores = _wide(scores)
        o_THV, sums = _forward(q_THK, k_SGK, v_SGV, spans, scores)
        ctx.save_for_backward(q_THK, k_SGK, v_SGV, *sums)
        ctx.spans, ctx.scores = spans, scores
        ctx.sinks_dtype = None if sinks_H is None else sinks_H.dtype
        return o_THV

    @staticmethod
    def backward(ctx: Any, do_THV: Tensor) -> tuple[Tensor | None, ...]:
        q_THK, k_SGK, v_SGV, *sums = ctx.saved_tensors
        dq_THK = torch.empty(q_THK.shape, dtype=q_THK.dtype)
        dk_SGK, dv_SGV = torch.zeros_like(k_SGK), torch.zeros_like(v_SGV)
        d_sinks_H = None if ctx.scores.sinks_H is None else torch.zeros_like(ctx.scores.sinks_H)
        lse = iter(sums)
        for span in ctx.spans:
            blocks = list(_blocks(span, ctx.scores.window))
            k0, k1 = span[2:4]
            # One block writes straight; several add up in fp32, or bf16 rounding would grow with the document.
            wide = len(blocks) > 1 and q_THK.dtype != torch.float32
            dk, dv = dk_SGK[k0:k1], dv_SGV[k0:k1]
            if wide:
                dk, dv = dk.float(), dv.float()
            for block in blocks:
                saved = (q_THK, k_SGK, v_SGV, do_THV)
                dk_MGK, dv_MGV = _block_backward(ctx.scores, block, saved, next(lse), dq_THK, d_sinks_H)
                rows = slice(block.key_from - k0, block.key_to - k0)
                dk[rows] += dk_MGK
                dv[rows] += dv_MGV
            if wide:
                dk_SGK[k0:k1], dv_SGV[k0:k1] = dk.to(k_SGK.dtype), dv.to(v_SGV.dtype)
        if d_sinks_H is not None:
            d_sinks_H = d_sinks_H.to(ctx.sinks_dtype)
        return dq_THK, dk_SGK, dv_SGV, d_sinks_H, None, None


def _wide(scores: Scores) -> Scores:
    """Sinks as the kernel takes them."""
    sinks_H = scores.sinks_H
    return scores if sinks_H is None else scores._replace(sinks_H=sinks_H.detach().float().contiguous())


def _forward(
    q_THK: Tensor,
    k_SGK: Tensor,
    v_SGV: Tensor,
    spans: Sequence[SpanBounds],
    scores: Scores,
    ranges: Sequence[KeyRange] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Outputs [T, H, V], and the log-sum-exp of each block."""
    library = native_for(q_THK, k_SGK, v_SGV)
    assert library is not None
    groups, sums = k_SGK.shape[1], []
    o_THV = torch.empty((*q_THK.shape[:2], v_SGV.shape[2]), dtype=q_THK.dtype)
    for span in spans:
        for block in _blocks(span, scores.window):
            pieces = _pieces(block, ranges)
            keys, values = ([x[piece] for piece in pieces] for x in (k_SGK, v_SGV))
            if len(pieces) > _MAX_PIECES:
                keys, values = [torch.cat(keys)], [torch.cat(values)]
            q_GNK = _fold(q_THK, block, groups)
            parts = [torch.bmm(q_GNK, k_MGK.permute(1, 2, 0)) for k_MGK in keys]
            p_GNM = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
            lse = torch.empty(p_GNM.shape[:2])
            _softmax(library, p_GNM, lse, block, scores, known=False)
            sums.append(lse)
            o_GNV = torch.bmm(p_GNM[..., : len(values[0])], values[0].transpose(0, 1))
            at = len(values[0])
            for v_MGV in values[1:]:
                o_GNV.baddbmm_(p_GNM[..., at : at + len(v_MGV)], v_MGV.transpose(0, 1))
                at += len(v_MGV)
            _unfold_into(o_THV, block, o_GNV)
    return o_THV, sums


def _pieces(block: _Block, ranges: Sequence[KeyRange] | None) -> list[slice]:
    """The slots of a block's keys."""
    if ranges is None:
        return [slice(block.key_from, block.key_to)]
    found = []
    for start, stop, slot in islice(ranges, bisect_right(ranges, block.key_from, key=itemgetter(1)), None):
        if start >= block.key_to:
            break
        first, last = max(start, block.key_from), min(stop, block.key_to)
        found.append(slice(slot + first - start, slot + last - start))
    return found


def _block_backward(
    scores: Scores,
    block: _Block,
    saved: tuple[Tensor, ...],
    lse: Tensor,
    dq_THK: Tensor,
    d_sinks_H: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Writes dq of the block's queries and adds to the sinks' gradient; returns dk and dv of its keys."""
    q_THK, k_SGK, v_SGV, do_THV = saved
    library = native_for(q_THK)
    assert library is not None
    groups = k_SGK.shape[1]
    k_GMK, v_GMV = (x[block.key_from : block.key_to].transpose(0, 1) for x in (k_SGK, v_SGV))
    q_GNK, do_GNV = _fold(q_THK, block, groups), _fold(do_THV, block, groups)
    p_GNM = torch.bmm(q_GNK, k_GMK.transpose(1, 2))
    _softmax(library, p_GNM, lse, block, scores, known=True)
    dv_GMV = torch.bmm(p_GNM.transpose(1, 2), do_GNV)
    ds_GNM = torch.bmm(do_GNV, v_GMV.transpose(1, 2))
    rows, keys = ds_GNM.shape[0] * ds_GNM.shape[1], ds_GNM.shape[2]
    dots = None if d_sinks_H is None else torch.empty(lse.shape)
    sizes = (rows, keys, scores.scale, scores.softcap or 0.0)
    library.call("softmax_backward", p_GNM.dtype, p_GNM, ds_GNM, lse, dots, *sizes)
    if d_sinks_H is not None and dots is not None:
        assert scores.sinks_H is not None
        lse_HL, dots_HL = (x.reshape(len(d_sinks_H), -1) for x in (lse, dots))
        d_sinks_H -= ((scores.sinks_H[:, None] - lse_HL).exp() * dots_HL).sum(1)
    _unfold_into(dq_THK, block, torch.bmm(ds_GNM, k_GMK))
    return torch.bmm(ds_GNM.transpose(1, 2), q_GNK).transpose(0, 1), dv_GMV.transpose(0, 1)


def _softmax(library: Library, p_GNM: Tensor, lse: Tensor, block: _Block, scores: Scores, *, known: bool) -> None:
    groups, folded, keys = p_GNM.shape
    rows = block.stop - block.start
    sizes = (groups, folded // rows, rows, keys, block.first_query, block.first_key, scores.window or 0, scores.scale)
    bias = scores.bias_HP
    positions = 0 if bias is None else bias.shape[1]
    extra = (int(known), bias, positions, scores.softcap or 0.0, scores.sinks_H, block.prefix)
    library.call("softmax", p_GNM.dtype, p_GNM, lse, *sizes, *extra)
