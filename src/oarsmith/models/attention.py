"""Grouped-query attention over a token stream.

Shapes: T tokens, D hidden, H query heads, G kv heads, R = H / G, K head dim, S key slots.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from oarsmith import kernels
from oarsmith.kernels import Scores, SpanBounds
from oarsmith.models.layout import Cache, CacheShape, Layout, Span
from oarsmith.models.linear import build_linear
from oarsmith.models.norm import build_norm
from oarsmith.models.position import PositionTables
from oarsmith.models.recompute import run
from oarsmith.models.spec_parts import GQA, QKNorm
from oarsmith.models.spec_position import Alibi


class Attention(nn.Module):
    def __init__(self, spec: GQA, layer: int) -> None:
        super().__init__()
        self.spec = spec
        self.layer = layer
        self.qkv = build_linear(spec.qkv)
        self.out = build_linear(spec.out)
        self.q_norm = build_norm(spec.qk_norm.q) if spec.qk_norm else None
        self.k_norm = build_norm(spec.qk_norm.k) if spec.qk_norm else None
        self.sinks = nn.Parameter(torch.empty(spec.num_heads)) if spec.sinks else None

    @property
    def cache_shape(self) -> CacheShape:
        head = (self.spec.num_kv_heads, self.spec.head_dim)
        return CacheShape(slots=(head, head))

    def forward(
        self,
        x_TD: Tensor,
        layout: Layout,
        tables: PositionTables,
        cache: Cache | None,
        *,
        recompute_core: bool = False,
    ) -> Tensor:
        def core(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor) -> Tensor:
            q_THK, k_TGK, bias_HP = self._positioned(q_THK, k_TGK, layout, tables)
            if layout.front is not None:
                k_TGK, v_TGK = layout.front(self.layer, k_TGK, v_TGK)
            # A copy of v, as the turned q and k are copies: then nothing keeps all of qkv for backward.
            k_SGK, v_SGK = (k_TGK, v_TGK.contiguous()) if cache is None else cache.write(self.layer, k_TGK, v_TGK)
            scores = Scores(self.spec.scale, self.spec.window, self.spec.softcap, bias_HP, self.sinks)
            return attend(q_THK, k_SGK, v_SGK, layout, scores)

        # The rotation is part of the core: q and k are then kept once, in the storage that v is a view of.
        return self.out(run(core, *self._project(x_TD), again=recompute_core).flatten(-2))

    def _positioned(
        self, q_THK: Tensor, k_TGK: Tensor, layout: Layout, tables: PositionTables
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Queries and keys that know their positions, and the bias on their scores."""
        spec, bias_HP = self.spec, None
        if isinstance(spec.position, Alibi):
            bias_HP = tables.biases[spec.position]
        elif spec.position is not None:
            rotate = tables.rotations[spec.position]
            q_THK, k_TGK = rotate(q_THK), rotate(k_TGK)
        if spec.log_n is not None and not self.training:
            growth_T = ((layout.positions_T + 1).float().log() / math.log(spec.log_n)).clamp_min(1)
            q_THK = q_THK * growth_T[:, None, None].to(q_THK.dtype)
        return q_THK, k_TGK, bias_HP

    def _project(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, H, K], keys and values [T, G, K], with their norms."""
        spec, qkv = self.spec, self.qkv(x_TD)
        heads, groups, dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
        if spec.packing == "grouped":
            share = heads // groups
            q, k, v = qkv.unflatten(-1, (groups, share + 2, dim)).split((share, 1, 1), dim=2)
            q, k, v = q.flatten(1), k.flatten(1), v.flatten(1)
        else:
            q, k, v = qkv.split((heads * dim, groups * dim, groups * dim), dim=-1)
        if spec.qk_norm is not None and spec.qk_norm.over == "projection":
            q, k = self._normed(spec.qk_norm, q, k)
        q_THK, k_TGK, v_TGK = (
            q.unflatten(-1, (heads, dim)),
            k.unflatten(-1, (groups, dim)),
            v.unflatten(-1, (groups, dim)),
        )
        if spec.qk_norm is not None and spec.qk_norm.over == "head":
            q_THK, k_TGK = self._normed(spec.qk_norm, q_THK, k_TGK)
        return q_THK, k_TGK, v_TGK

    def _normed(self, norm: QKNorm, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        assert self.q_norm is not None and self.k_norm is not None, norm
        return self.q_norm(q), self.k_norm(k)


def attend(q_THK: Tensor, k_SGK: Tensor, v_SGV: Tensor, layout: Layout, scores: Scores) -> Tensor:
    """softmax(scores) v [T, H, V], every query over the keys that the layout shows its head."""
    if (branches := layout.branches) is not None:
        # Queries of a shared beginning are computed for each document, and used of the first.
        q_EHK, k_EGK, v_EGV = (x.index_select(0, branches.source_E) for x in (q_THK, k_SGK, v_SGV))
        return attend(q_EHK, k_EGK, v_EGV, branches.layout, scores).index_select(0, branches.own_T)
    if layout.rows is not None:
        positions_BT = layout.rows.positions_BT
        q_BTHK = q_THK.unflatten(0, positions_BT.shape)
        return kernels.row_attention(q_BTHK, k_SGK, v_SGV, positions_BT, scores).flatten(0, 1)
    if layout.halves is None:
        return kernels.attention(q_THK, k_SGK, v_SGV, span_bounds(layout.spans), scores, layout.ranges)
    num_heads, groups = q_THK.shape[1], k_SGK.shape[1]
    if groups % 2:
        # The halves would share a kv head: each query head gets its own copy.
        share = num_heads // groups
        k_SGK, v_SGV = (x[:, :, None].expand(-1, -1, share, -1).flatten(1, 2) for x in (k_SGK, v_SGV))
        groups = num_heads
    cut, kv_cut = num_heads // 2, groups // 2
    outputs = []
    for spans, heads, kv_heads in zip(
        layout.halves, (slice(cut), slice(cut, None)), (slice(kv_cut), slice(kv_cut, None)), strict=True
    ):
        bias_HP, sinks_H = (None if x is None else x[heads] for x in (scores.bias_HP, scores.sinks_H))
        own = scores._replace(bias_HP=bias_HP, sinks_H=sinks_H)
        outputs.append(
            kernels.attention(q_THK[:, heads], k_SGK[:, kv_heads], v_SGV[:, kv_heads], span_bounds(spans), own)
        )
    return torch.cat(outputs, 1)


def span_bounds(spans: Sequence[Span]) -> list[SpanBounds]:
    """The spans as the kernel takes them."""
    return [(span.q_start, span.q_stop, span.k_start, span.k_stop, span.prefix) for span in spans]
