"""The residual block. Shapes: T tokens, D hidden."""

from __future__ import annotations

from torch import Tensor, nn

from oarsmith.models.attention import Attention, RopeTables
from oarsmith.models.layout import KVCache, Layout
from oarsmith.models.mlp import build_ffn
from oarsmith.models.norm import build_norm
from oarsmith.models.spec import LayerSpec


class Block(nn.Module):
    def __init__(self, spec: LayerSpec, layer: int) -> None:
        super().__init__()
        self.attention_norm = build_norm(spec.attention_norm)
        self.attention = Attention(spec.attention, layer)
        self.ffn_norm = build_norm(spec.ffn_norm)
        self.ffn = build_ffn(spec.ffn)

    def forward(self, x_TD: Tensor, layout: Layout, tables: RopeTables, cache: KVCache | None) -> Tensor:
        x_TD = x_TD + self.attention(self.attention_norm(x_TD), layout, tables, cache)
        return x_TD + self.ffn(self.ffn_norm(x_TD))
