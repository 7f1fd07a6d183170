"""The residual block. Shapes: T tokens, D hidden."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from oarsmith.models.attention import Attention
from oarsmith.models.layout import Cache, Layout
from oarsmith.models.lfa import FilteredAttention
from oarsmith.models.mla import LatentAttention
from oarsmith.models.mlp import FeedForward, GatedFeedForward
from oarsmith.models.moe import MixtureOfExperts
from oarsmith.models.norm import LayerNorm, RMSNorm, build_norm
from oarsmith.models.position import PositionTables
from oarsmith.models.recompute import Granularity, run
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
    named_norms,
)
from oarsmith.models.spec_parts import FFN, GQA, LFA, MLA, MLP, AttentionSpec, GatedMLP, MoE, NormSpec

AttentionModule = Attention | LatentAttention | FilteredAttention


class Block(nn.Module):
    """Norms are named after the part they belong to: ``attention_norm``, ``ffn_norm``, and ``..._post_norm``."""

    def __init__(self, spec: LayerSpec, layer: int) -> None:
        super().__init__()
        self.wiring = spec.wiring
        norms = named_norms(spec.wiring)
        self.attention_norm = build_norm(norms["attention_norm"])
        self.attention = build_attention(spec.attention, layer)
        self.attention_post_norm = _optional(norms.get("attention_post_norm"))
        self.ffn_norm = _optional(norms.get("ffn_norm"))
        self.ffn = build_ffn(spec.ffn)
        self.ffn_post_norm = _optional(norms.get("ffn_post_norm"))

    def forward(
        self,
        x_TD: Tensor,
        layout: Layout,
        tables: PositionTables,
        cache: Cache | None,
        recompute: Granularity | None = None,
    ) -> Tensor:
        """``recompute``: what within the block runs again in backward; all of it (``full``) is up to the caller."""

        def attend(h_TD: Tensor) -> Tensor:
            return self.attention(h_TD, layout, tables, cache, recompute_core=recompute == "core_attn")

        again = recompute == "full_attn"
        match self.wiring:
            case Sequential(attention=attention, ffn=ffn):
                assert self.ffn_norm is not None, ffn
                norms = self.attention_norm, self.attention_post_norm
                x_TD = run(_add, attention, attend, *norms, x_TD, again=again)
                return _add(ffn, self.ffn, self.ffn_norm, self.ffn_post_norm, x_TD)
            case Parallel():
                h_TD = self.attention_norm(x_TD)
                mixed_TD = run(attend, h_TD, again=again)
                return x_TD + mixed_TD + self.ffn(h_TD if self.ffn_norm is None else self.ffn_norm(x_TD))


def _optional(spec: NormSpec | None) -> RMSNorm | LayerNorm | None:
    return None if spec is None else build_norm(spec)


def _add(
    rule: Residual,
    part: Callable[[Tensor], Tensor],
    norm: Callable[[Tensor], Tensor],
    post_norm: Callable[[Tensor], Tensor] | None,
    x_TD: Tensor,
) -> Tensor:
    """The stream after ``part``."""
    match rule:
        case PreNorm(scale=scale):
            y_TD = part(norm(x_TD))
            return x_TD + (y_TD if scale == 1.0 else y_TD * scale)
        case Sandwich():
            assert post_norm is not None, rule
            return x_TD + post_norm(part(norm(x_TD)))
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
