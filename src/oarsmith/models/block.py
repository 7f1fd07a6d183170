"""The residual block. Shapes: T tokens, D hidden."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from oarsmith.models.attention import Attention
from oarsmith.models.layout import KVCache, Layout
from oarsmith.models.lfa import FilteredAttention
from oarsmith.models.mla import LatentAttention
from oarsmith.models.mlp import FeedForward, GatedFeedForward
from oarsmith.models.moe import MixtureOfExperts
from oarsmith.models.norm import build_norm
from oarsmith.models.position import PositionTables
from oarsmith.models.spec import (
    LayerSpec,
    NormedStream,
    OutputNorm,
    Parallel,
    PostNorm,
    PreNorm,
    Residual,
    Sandwich,
    Sequential,
)
from oarsmith.models.spec_parts import FFN, GQA, LFA, MLA, MLP, AttentionSpec, GatedMLP, MoE

AttentionModule = Attention | LatentAttention | FilteredAttention


class Block(nn.Module):
    """Norms are named after the part they belong to: ``attention_norm``, ``ffn_norm``, and ``..._post_norm``."""

    def __init__(self, spec: LayerSpec, layer: int) -> None:
        super().__init__()
        self.wiring = spec.wiring
        self.attention = build_attention(spec.attention, layer)
        self.ffn = build_ffn(spec.ffn)
        match spec.wiring:
            case Sequential(attention=attention, ffn=ffn):
                self.attention_norm = build_norm(attention.norm)
                self.ffn_norm = build_norm(ffn.norm)
                if isinstance(attention, Sandwich):
                    self.attention_post_norm = build_norm(attention.post_norm)
                if isinstance(ffn, Sandwich):
                    self.ffn_post_norm = build_norm(ffn.post_norm)
            case Parallel(norm=norm, ffn_norm=ffn_norm):
                self.attention_norm = build_norm(norm)
                if ffn_norm is not None:
                    self.ffn_norm = build_norm(ffn_norm)

    def forward(self, x_TD: Tensor, layout: Layout, tables: PositionTables, cache: KVCache | None) -> Tensor:
        def attend(h_TD: Tensor) -> Tensor:
            return self.attention(h_TD, layout, tables, cache)

        match self.wiring:
            case Sequential(attention=attention, ffn=ffn):
                x_TD = self._residual(attention, "attention", attend, x_TD)
                return self._residual(ffn, "ffn", self.ffn, x_TD)
            case Parallel(ffn_norm=ffn_norm):
                h_TD = self.attention_norm(x_TD)
                return x_TD + attend(h_TD) + self.ffn(h_TD if ffn_norm is None else self.ffn_norm(x_TD))

    def _residual(self, rule: Residual, name: str, part: Callable[[Tensor], Tensor], x_TD: Tensor) -> Tensor:
        norm = self.get_submodule(f"{name}_norm")
        match rule:
            case PreNorm(scale=scale):
                y_TD = part(norm(x_TD))
                return x_TD + (y_TD if scale == 1.0 else y_TD * scale)
            case Sandwich():
                return x_TD + self.get_submodule(f"{name}_post_norm")(part(norm(x_TD)))
            case OutputNorm():
                return x_TD + norm(part(x_TD))
            case PostNorm():
                return norm(x_TD + part(x_TD))
            case NormedStream(scale=scale):
                h_TD = norm(x_TD)
                return h_TD * scale + part(h_TD)


def build_attention(spec: AttentionSpec, layer: int) -> AttentionModule:
    match spec:
        case GQA():
            return Attention(spec, layer)
        case MLA():
            return LatentAttention(spec, layer)
        case LFA():
            return FilteredAttention(spec, layer)


def build_ffn(spec: FFN) -> GatedFeedForward | FeedForward | MixtureOfExperts:
    match spec:
        case GatedMLP():
            return GatedFeedForward(spec)
        case MLP():
            return FeedForward(spec)
        case MoE():
            return MixtureOfExperts(spec)
