"""Grouped-query attention over a token stream.

Shapes: T tokens, D hidden, H query heads, G kv heads, K head dim, S key slots.
"""

from __future__ import annotations

from torch import Tensor, nn

from oarsmith import kernels
from oarsmith.models.layout import KVCache, Layout
from oarsmith.models.linear import build_linear
from oarsmith.models.norm import RMSNorm
from oarsmith.models.spec import GQA, Rope

RopeTables = dict[Rope, tuple[Tensor, Tensor]]


class Attention(nn.Module):
    def __init__(self, spec: GQA, layer: int) -> None:
        super().__init__()
        self.spec = spec
        self.layer = layer
        self.qkv = build_linear(spec.qkv)
        self.out = build_linear(spec.out)
        self.q_norm = RMSNorm(spec.q_norm) if spec.q_norm else None
        self.k_norm = RMSNorm(spec.k_norm) if spec.k_norm else None

    def forward(self, x_TD: Tensor, layout: Layout, tables: RopeTables, cache: KVCache | None) -> Tensor:
        spec = self.spec
        q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        q, k, v = self.qkv(x_TD).split((q_size, kv_size, kv_size), dim=-1)
        q_THK = q.unflatten(-1, (spec.num_heads, spec.head_dim))
        k_TGK = k.unflatten(-1, (spec.num_kv_heads, spec.head_dim))
        v_TGK = v.unflatten(-1, (spec.num_kv_heads, spec.head_dim))
        if self.q_norm is not None:
            q_THK = self.q_norm(q_THK)
        if self.k_norm is not None:
            k_TGK = self.k_norm(k_TGK)
        if spec.rope is not None:
            cos_TF, sin_TF = tables[spec.rope]
            q_THK, k_TGK = kernels.rope(q_THK, cos_TF, sin_TF), kernels.rope(k_TGK, cos_TF, sin_TF)
        if cache is None:
            k_SGK, v_SGK = k_TGK, v_TGK
        else:
            k_SGK, v_SGK = cache.write(self.layer, k_TGK, v_TGK)
        spans = [(span.q_start, span.q_stop, span.k_start, span.k_stop) for span in layout.spans]
        o_THK = kernels.attention(q_THK, k_SGK, v_SGK, spans, scale=spec.scale, window=spec.window)
        return self.out(o_THK.flatten(-2))
