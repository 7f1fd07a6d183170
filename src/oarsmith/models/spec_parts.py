"""The parts of a block as data: linear maps, norms, attention, feed-forward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from oarsmith.models.spec_position import Position, Rope

if TYPE_CHECKING:
    from oarsmith.models.linear import Linear


class LinearRewrite(Protocol):
    """Builds the module of one linear map in place of the plain one (an adapter, a quantized weight)."""

    def build(self, spec: LinearSpec) -> Linear: ...


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Named rows of a fused linear map: the name is the one the family's checkpoint gives that projection."""

    name: str
    size: int


@dataclass(frozen=True, kw_only=True)
class LinearSpec:
    """y = x W^T + b, with the rows of W in named segments (a fused q, k, v is one map with three segments).

    ``experts``: that many maps of this shape in one parameter with a leading axis, each applied to its own tokens.
    """

    in_features: int
    segments: tuple[Segment, ...]
    bias: bool = False
    experts: int | None = None
    rewrite: LinearRewrite | None = None

    @property
    def out_features(self) -> int:
        return sum(segment.size for segment in self.segments)

    def bounds(self) -> Iterator[tuple[Segment, int, int]]:
        """Each segment with its first row and the row after its last."""
        start = 0
        for segment in self.segments:
            yield segment, start, start + segment.size
            start += segment.size


@dataclass(frozen=True, kw_only=True)
class RMSNormSpec:
    """x / rms(x) * w, or * (1 + w) with ``unit_offset`` (Gemma). Zhang and Sennrich 2019, eq. 4."""

    size: int
    eps: float
    unit_offset: bool = False


@dataclass(frozen=True, kw_only=True)
class LayerNormSpec:
    """(x - mean) / std * w + b. Ba et al. 2016. ``heads``: each head has weights of its own (Cohere's q and k).

    ``affine``: without it there is neither w nor b.
    """

    size: int
    eps: float
    bias: bool = True
    heads: int | None = None
    affine: bool = True


NormSpec = RMSNormSpec | LayerNormSpec


@dataclass(frozen=True, kw_only=True)
class QKNorm:
    """Norms of queries and keys before positions enter, over each ``head`` or over the whole ``projection``."""

    q: NormSpec
    k: NormSpec
    over: Literal["head", "projection"] = "head"


@dataclass(frozen=True, kw_only=True)
class GQA:
    """Grouped-query attention (Ainslie et al. 2023); with one kv head for each query head it is plain multi-head.

    ``packing``: rows of ``qkv`` are all q, then all k, then all v (``blocks``), or kv head by kv head its queries, its
    key, its value (``grouped``). ``window`` W: j is seen iff 0 <= i - j < W. ``softcap`` c: scores become
    c * tanh(score / c). ``sinks``: each head has a learned score that takes part in the softmax and nothing else.
    ``log_n`` n: outside training, queries at position p are multiplied by max(1, log_n(p + 1)).
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    qkv: LinearSpec
    out: LinearSpec
    position: Position | None
    packing: Literal["blocks", "grouped"] = "blocks"
    window: int | None = None
    qk_norm: QKNorm | None = None
    softcap: float | None = None
    sinks: bool = False
    log_n: int | None = None


@dataclass(frozen=True, kw_only=True)
class MLA:
    """Multi-head latent attention (DeepSeek-V2, 2024, section 2.1).

    ``kv_down`` gives the latent [latent_dim] that is cached and the one rotary key [rope_dim] all heads share;
    ``kv_up`` makes each head's key [nope_dim] and value [v_dim] of the normed latent. Queries come straight from x
    (``q_up`` alone) or through a normed bottleneck (``q_down``, ``q_norm``).
    """

    num_heads: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    latent_dim: int
    scale: float
    q_down: LinearSpec | None
    q_norm: NormSpec | None
    q_up: LinearSpec
    kv_down: LinearSpec
    kv_norm: NormSpec
    kv_up: LinearSpec
    out: LinearSpec
    position: Rope


@dataclass(frozen=True, kw_only=True)
class LFA:
    """Localized filtering attention (Yuan 2.0, 2023): q and k see each token mixed with the two before it.

    Two causal convolutions of width 2 (hidden -> hidden / 2 -> hidden), added to the input and normed, feed ``qk``;
    ``v`` takes the unfiltered input. Each head's query and key are the halves of its 2 * head_dim rows of ``qk``.
    """

    num_heads: int
    head_dim: int
    scale: float
    qk: LinearSpec
    v: LinearSpec
    out: LinearSpec
    filter_norm: RMSNormSpec
    position: Rope


AttentionSpec = GQA | MLA | LFA


@dataclass(frozen=True, kw_only=True)
class ClampedSwiGLU:
    """g * sigmoid(alpha * g) * (u + 1) with g clamped above and u on both sides by ``limit`` (gpt-oss)."""

    alpha: float
    limit: float


Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]


@dataclass(frozen=True, kw_only=True)
class GatedMLP:
    """down(act(gate(x)) * up(x)). ``gate_up`` has the gate rows first (Shazeer 2020, GLU variants)."""

    gate_up: LinearSpec
    down: LinearSpec
    activation: Activation | ClampedSwiGLU


@dataclass(frozen=True, kw_only=True)
class MLP:
    """down(act(up(x)))."""

    up: LinearSpec
    down: LinearSpec
    activation: Activation


@dataclass(frozen=True, kw_only=True)
class ExpertGroups:
    """Only experts of the ``kept`` best of ``num_groups`` groups may be chosen; a group scores the sum of its ``best``.

    DeepSeek-V2 (best 1) and V3 (best 2).
    """

    num_groups: int
    kept: int
    best: int


@dataclass(frozen=True, kw_only=True)
class RouterSpec:
    """Which ``top_k`` of ``num_experts`` experts take a token, and with what weights.

    Args:
        score: of an expert: softmax over all, or a sigmoid for each.
        normalize: the chosen weights are divided by their sum.
        scale: factor on the weights.
        bias: the router's map has one.
        correction: a stored value for each expert takes part in the choice, not in the weights (DeepSeek-V3).
    """

    num_experts: int
    top_k: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True
    scale: float = 1.0
    groups: ExpertGroups | None = None
    bias: bool = False
    correction: bool = False


@dataclass(frozen=True, kw_only=True)
class MoE:
    """sum over chosen experts of weight * expert(x), plus ``shared`` experts every token passes.

    ``shared_gate``: the shared output is multiplied by sigmoid of a learned map of x to one number (Qwen2-MoE).
    """

    router: RouterSpec
    experts: GatedMLP
    shared: GatedMLP | None = None
    shared_gate: bool = False


FFN = GatedMLP | MLP | MoE
