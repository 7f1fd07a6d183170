"""Attention of whole documents in one kernel: bf16 on CPUs with AVX512_BF16.

Shapes: T tokens, H query heads, G kv heads, K key dim, V value dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from oarsmith.kernels.select import native_for

_MAX_DIM = 256


def document_bounds(
    q_THK: Tensor, k_SGK: Tensor, v_SGV: Tensor, spans: Sequence[tuple[int, int, int, int, int]]
) -> Tensor | None:
    """Borders of the documents where the kernel can do this call, else None.

    It takes bf16 documents that lie end to end, every token of them a query and a key, with heads of a multiple of 16
    entries.
    """
    library = native_for(q_THK, k_SGK, v_SGV)
    if library is None or not library.has_document_attention or q_THK.dtype != torch.bfloat16:
        return None
    tokens, _, dim = q_THK.shape
    if len(k_SGK) != tokens or dim % 16 or v_SGV.shape[2] % 16 or max(dim, v_SGV.shape[2]) > _MAX_DIM:
        return None
    if any(x.stride(2) != 1 for x in (q_THK, k_SGK, v_SGV)):
        return None
    bounds = [0]
    for q0, q1, k0, k1, prefix in spans:
        if (q0, q1) != (k0, k1) or q0 != bounds[-1] or prefix:
            return None
        bounds.append(q1)
    return torch.tensor(bounds) if bounds[-1] == tokens else None


def document_attention(
    q_THK: Tensor, k_TGK: Tensor, v_TGV: Tensor, bounds: Tensor, *, scale: float, window: int | None
) -> Tensor:
    """Causal softmax(scale q k^T) v within each document, heads grouped; output [T, H, V].

    Scores and sums are fp32; probabilities are rounded to bf16 before the product with v, score gradients before those
    with q and k. Results do not depend on the number of threads.
    """
    return _DocumentAttention.apply(q_THK, k_TGK, v_TGV, bounds, scale, window or 0)


class _DocumentAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_THK: Tensor, k_TGK: Tensor, v_TGV: Tensor, bounds: Tensor, scale: float, window: int
    ) -> Tensor:
        library = native_for(q_THK)
        assert library is not None
        tokens, heads, dim = q_THK.shape
        o_THV = torch.empty((tokens, heads, v_TGV.shape[2]), dtype=q_THK.dtype)
        lse_HT = torch.empty((heads, tokens))
        strides = torch.tensor([stride for x in (q_THK, k_TGK, v_TGV) for stride in x.stride()[:2]])
        sizes = (heads, k_TGK.shape[1], dim, v_TGV.shape[2], window, scale)
        place = (bounds, len(bounds) - 1, strides)
        library.call("document_attention", q_THK.dtype, q_THK, k_TGK, v_TGV, o_THV, lse_HT, *place, *sizes)
        ctx.save_for_backward(q_THK, k_TGK, v_TGV, o_THV, lse_HT)
        ctx.place, ctx.sizes = place, sizes
        return o_THV

    @staticmethod
    def backward(ctx: Any, do_THV: Tensor) -> tuple[Tensor | None, ...]:
        q_THK, k_TGK, v_TGV, o_THV, lse_HT = ctx.saved_tensors
        library = native_for(q_THK)
        assert library is not None
        dq_THK, dk_TGK, dv_TGV = (torch.empty(x.shape, dtype=x.dtype) for x in (q_THK, k_TGK, v_TGV))
        saved = (q_THK, k_TGK, v_TGV, o_THV, do_THV.contiguous(), lse_HT)
        library.call("document_attention_backward", q_THK.dtype, *saved, dq_THK, dk_TGK, dv_TGV, *ctx.place, *ctx.sizes)
        return dq_THK, dk_TGK, dv_TGV, None, None, None
