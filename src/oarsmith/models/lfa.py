"""Localized filtering attention over a token stream (Yuan 2.0).

Shapes: T tokens, D hidden, C = D / 2 channels, H heads, K head dim, E rows of the extended stream.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from oarsmith.kernels import Scores
from oarsmith.models.attention import attend
from oarsmith.models.layout import Cache, CacheShape, Layout
from oarsmith.models.linear import build_linear
from oarsmith.models.norm import RMSNorm
from oarsmith.models.position import PositionTables
from oarsmith.models.recompute import run
from oarsmith.models.spec_parts import LFA


class Tap(nn.Module):
    """y[t] = W x[t - 1] + V x[t] + b: a causal convolution of width 2. ``weight`` [2, out, in], the older tap first."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features))

    def forward(self, x_ED: Tensor) -> Tensor:
        """[E, in] -> [E - 1, out]: the first row has no predecessor."""
        older, newer = self.weight.unbind()
        return functional.linear(x_ED[:-1], older) + functional.linear(x_ED[1:], newer, self.bias)


class LocalFilter(nn.Module):
    """norm(x + conv(conv(x))), each document starting from nothing; the last two inputs are kept for the next call."""

    def __init__(self, spec: LFA, layer: int) -> None:
        super().__init__()
        size = spec.filter_norm.size
        self.layer = layer
        self.first = Tap(size, size // 2)
        self.second = Tap(size // 2, size)
        self.norm = RMSNorm(spec.filter_norm)

    def forward(self, x_TD: Tensor, layout: Layout, cache: Cache | None) -> Tensor:
        if (branches := layout.branches) is not None:
            y_ED = self(x_TD.index_select(0, branches.source_E), branches.layout, cache)
            return y_ED.index_select(0, branches.own_T)
        state_N2D = None if cache is None else cache.state(self.layer)
        nothing = x_TD.new_zeros(2, x_TD.shape[1])
        extended, kept, begins, at = [], [], [], 0
        for piece in layout.pieces:
            # Two rows before each piece: what came before it.
            old = nothing if state_N2D is None or piece.old == 0 else state_N2D[piece.sequence].to(x_TD.dtype)
            rows = torch.cat((old, x_TD[piece.start : piece.stop]))
            if state_N2D is not None:
                state_N2D[piece.sequence] = rows[-2:]
            if piece.old == 0:
                begins.append(at)
            kept.append(torch.arange(at, at + piece.stop - piece.start, device=x_TD.device))
            extended.append(rows)
            at += len(rows)
        y_EC = self.first(torch.cat(extended))
        if begins:
            # Before a document there is no token, so the first convolution gives nothing there, not even its bias.
            y_EC = y_EC.index_fill(0, torch.tensor(begins, device=x_TD.device), 0.0)
        return self.norm(self.second(y_EC)[torch.cat(kept)] + x_TD)


class FilteredAttention(nn.Module):
    def __init__(self, spec: LFA, layer: int) -> None:
        super().__init__()
        self.spec = spec
        self.layer = layer
        self.filter = LocalFilter(spec, layer)
        self.qk = build_linear(spec.qk)
        self.v = build_linear(spec.v)
        self.out = build_linear(spec.out)

    @property
    def cache_shape(self) -> CacheShape:
        head = (self.spec.num_heads, self.spec.head_dim)
        return CacheShape(slots=(head, head), state=(2, self.spec.filter_norm.size))

    def forward(
        self,
        x_TD: Tensor,
        layout: Layout,
        tables: PositionTables,
        cache: Cache | None,
        *,
        recompute_core: bool = False,
    ) -> Tensor:
        spec, rotate = self.spec, tables.rotations[self.spec.position]

        def core(qk: Tensor, v_THK: Tensor) -> Tensor:
            q_THK, k_THK = rotate(qk[:, :, 0]), rotate(qk[:, :, 1])
            k_SHK, v_SHK = (k_THK, v_THK) if cache is None else cache.write(self.layer, k_THK, v_THK)
            return attend(q_THK, k_SHK, v_SHK, layout, Scores(spec.scale))

        qk = self.qk(self.filter(x_TD, layout, cache)).unflatten(-1, (spec.num_heads, 2, spec.head_dim))
        v_THK = self.v(x_TD).unflatten(-1, (spec.num_heads, spec.head_dim))
        return self.out(run(core, qk, v_THK, again=recompute_core).flatten(-2))
