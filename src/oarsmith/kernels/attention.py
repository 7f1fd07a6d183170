"""Causal attention over spans of a token stream.

Shapes: T query tokens, S key slots, H query heads, G kv heads, R = H / G heads that share a kv head, K head dim,
L queries of a block, M keys of a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from oarsmith.kernels.select import Library, native_for

# (first query, end of queries, first key slot, end of key slots); the last query sees up to the last key.
SpanBounds = tuple[int, int, int, int]

# Queries per block. Long documents are cut so that the keys above the diagonal are mostly never touched.
BLOCK = 256


def attention(
    q_THK: Tensor, k_SGK: Tensor, v_SGK: Tensor, spans: Sequence[SpanBounds], *, scale: float, window: int | None = None
) -> Tensor:
    """softmax(scale * q k^T) v within each span, causal, heads grouped; output [T, H, K].

    Args:
        spans: together they hold every query once. Keys of other spans are invisible.
        window: key j is visible to query i iff 0 <= i - j < window.
    """
    if native_for(q_THK, k_SGK, v_SGK) is not None:
        return _SpanAttention.apply(q_THK, k_SGK, v_SGK, spans, scale, window or 0)
    return attention_reference(q_THK, k_SGK, v_SGK, spans, scale=scale, window=window)


def attention_reference(
    q_THK: Tensor, k_SGK: Tensor, v_SGK: Tensor, spans: Sequence[SpanBounds], *, scale: float, window: int | None = None
) -> Tensor:
    """The plain twin: PyTorch's scaled dot product attention, span by span."""
    outputs = []
    for q0, q1, k0, k1 in spans:
        q, k, v = (x.transpose(0, 1)[None] for x in (q_THK[q0:q1], k_SGK[k0:k1], v_SGK[k0:k1]))
        causal = q1 - q0 == k1 - k0 and window is None
        mask = None
        if not causal and (q1 - q0 > 1 or window is not None):
            query = torch.arange(k1 - k0 - (q1 - q0), k1 - k0, device=q.device)[:, None]
            key = torch.arange(k1 - k0, device=q.device)
            mask = key <= query
            if window is not None:
                mask = mask & (query - key < window)
        out = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(out[0].transpose(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _blocks(span: SpanBounds, window: int) -> Iterator[tuple[int, int, int, int, int, int]]:
    """(q from, q to, key slot from, key slot to, index of the first query, index of the first key) of each block.

    Indices count from the span's first key.
    """
    q0, q1, k0, k1 = span
    if q0 == q1:
        return
    offset = (k1 - k0) - (q1 - q0)
    step = BLOCK if q1 - q0 > BLOCK + BLOCK // 2 else q1 - q0
    for start in range(q0, q1, step):
        stop = min(start + step, q1)
        first = start - q0 + offset
        last_key = stop - q0 + offset
        first_key = max(first - window + 1, 0) if window > 0 else 0
        yield start, stop, k0 + first_key, k0 + last_key, first, first_key


def _fold(x_THK: Tensor, start: int, stop: int, groups: int) -> Tensor:
    """[T, H, K] rows -> [G, R * L, K]: queries that share keys in one matrix."""
    dim = x_THK.shape[-1]
    return x_THK[start:stop].unflatten(1, (groups, -1)).permute(1, 2, 0, 3).reshape(groups, -1, dim)


def _unfold_into(out_THK: Tensor, start: int, stop: int, x_GNK: Tensor) -> None:
    groups, _, dim = x_GNK.shape
    target = out_THK[start:stop].unflatten(1, (groups, -1))
    target.copy_(x_GNK.view(groups, -1, stop - start, dim).permute(2, 0, 1, 3))


class _SpanAttention(torch.autograd.Function):
    """Block by block as batched matrix products; backward recomputes the probabilities from the log-sum-exp.

    On 2 AVX-512 cores this is 2.1x PyTorch's CPU flash attention at these lengths (forward and backward, bf16).
    """

    @staticmethod
    def forward(
        ctx: Any, q_THK: Tensor, k_SGK: Tensor, v_SGK: Tensor, spans: Sequence[SpanBounds], scale: float, window: int
    ) -> Tensor:
        library = native_for(q_THK, k_SGK, v_SGK)
        assert library is not None
        groups = k_SGK.shape[1]
        o_THK = torch.empty(q_THK.shape, dtype=q_THK.dtype)
        sums: list[Tensor] = []
        for span in spans:
            for block in _blocks(span, window):
                start, stop, key_from, key_to, first, key0 = block
                k_GMK, v_GMK = k_SGK[key_from:key_to].transpose(0, 1), v_SGK[key_from:key_to].transpose(0, 1)
                p_GNM = torch.bmm(_fold(q_THK, start, stop, groups), k_GMK.transpose(1, 2))
                lse = torch.empty(p_GNM.shape[:2])
                _softmax(library, "softmax_forward", p_GNM, lse, stop - start, first, key0, window, scale)
                sums.append(lse)
                _unfold_into(o_THK, start, stop, torch.bmm(p_GNM, v_GMK))
        ctx.save_for_backward(q_THK, k_SGK, v_SGK, *sums)
        ctx.spans, ctx.scale, ctx.window = spans, scale, window
        return o_THK

    @staticmethod
    def backward(ctx: Any, do_THK: Tensor) -> tuple[Tensor | None, ...]:
        q_THK, k_SGK, v_SGK, *sums = ctx.saved_tensors
        dq_THK = torch.empty(q_THK.shape, dtype=q_THK.dtype)
        dk_SGK, dv_SGK = torch.zeros_like(k_SGK), torch.zeros_like(v_SGK)
        lse = iter(sums)
        for span in ctx.spans:
            blocks = list(_blocks(span, ctx.window))
            _, _, k0, k1 = span
            # One block writes straight; several add up in fp32, or bf16 rounding would grow with the document.
            wide = len(blocks) > 1 and q_THK.dtype != torch.float32
            dk, dv = dk_SGK[k0:k1], dv_SGK[k0:k1]
            if wide:
                dk, dv = dk.float(), dv.float()
            for block in blocks:
                dk_MGK, dv_MGK = _block_backward(ctx, block, (q_THK, k_SGK, v_SGK, do_THK), next(lse), dq_THK)
                rows = slice(block[2] - k0, block[3] - k0)
                dk[rows] += dk_MGK
                dv[rows] += dv_MGK
            if wide:
                dk_SGK[k0:k1], dv_SGK[k0:k1] = dk.to(k_SGK.dtype), dv.to(v_SGK.dtype)
        return dq_THK, dk_SGK, dv_SGK, None, None, None


def _block_backward(
    ctx: Any, block: tuple[int, ...], saved: tuple[Tensor, ...], lse: Tensor, dq_THK: Tensor
) -> tuple[Tensor, Tensor]:
    """Writes dq of the block's queries; returns dk and dv [M, G, K] of its keys."""
    start, stop, key_from, key_to, first, key0 = block
    q_THK, k_SGK, v_SGK, do_THK = saved
    library = native_for(q_THK)
    assert library is not None
    groups = k_SGK.shape[1]
    k_GMK, v_GMK = k_SGK[key_from:key_to].transpose(0, 1), v_SGK[key_from:key_to].transpose(0, 1)
    q_GNK, do_GNK = _fold(q_THK, start, stop, groups), _fold(do_THK, start, stop, groups)
    p_GNM = torch.bmm(q_GNK, k_GMK.transpose(1, 2))
    _softmax(library, "softmax_again", p_GNM, lse, stop - start, first, key0, ctx.window, ctx.scale)
    dv_GMK = torch.bmm(p_GNM.transpose(1, 2), do_GNK)
    ds_GNM = torch.bmm(do_GNK, v_GMK.transpose(1, 2))
    rows = ds_GNM.shape[0] * ds_GNM.shape[1]
    library.call("softmax_backward", p_GNM.dtype, p_GNM, ds_GNM, rows, ds_GNM.shape[2], ctx.scale)
    _unfold_into(dq_THK, start, stop, torch.bmm(ds_GNM, k_GMK))
    return torch.bmm(ds_GNM.transpose(1, 2), q_GNK).transpose(0, 1), dv_GMK.transpose(0, 1)


def _softmax(
    library: Library, name: str, p_GNM: Tensor, lse: Tensor, rows: int, first: int, key0: int, window: int, scale: float
) -> None:
    groups, folded, keys = p_GNM.shape
    library.call(name, p_GNM.dtype, p_GNM, lse, groups, folded // rows, rows, keys, first, key0, window, scale)
