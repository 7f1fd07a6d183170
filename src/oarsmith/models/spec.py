"""The decoder as data: frozen values that say what to build, before any module exists.

A family turns a ``config.json`` into a :class:`DecoderSpec`. Capabilities (adapters, quantized linears, sharding)
rewrite the spec; nothing patches modules afterwards. Where families differ in kind, the slot holds a sum type
(``GatedMLP | MLP``, ``RMSNormSpec | LayerNormSpec``, ``Rope | None``), never a set of flags.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from oarsmith.models.linear import Linear

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


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
    """y = x W^T + b, with the rows of W in named segments (a fused q, k, v is one map with three segments)."""

    in_features: int
    segments: tuple[Segment, ...]
    bias: bool = False
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
    """(x - mean) / std * w + b. Ba et al. 2016."""

    size: int
    eps: float
    bias: bool = True


NormSpec = RMSNormSpec | LayerNormSpec


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Positions divided by ``factor`` (position interpolation, Chen et al. 2023)."""

    factor: float


@dataclass(frozen=True, kw_only=True)
class DynamicScaling:
    """NTK-aware base that grows with the sequence once it is longer than ``original_length``."""

    factor: float
    original_length: int


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1: long wavelengths divided by ``factor``, short ones kept, a linear ramp between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN (Peng et al. 2023): interpolation by parts and a factor on the attention logits through cos and sin."""

    factor: float
    original_length: int
    beta_fast: float
    beta_slow: float
    attention_factor: float
    truncate: bool = True


RopeScaling = LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary embedding of the first ``dim`` entries of each head, half-split pairs (i, i + dim / 2)."""

    dim: int
    theta: float
    scaling: RopeScaling | None = None


@dataclass(frozen=True, kw_only=True)
class GQA:
    """Grouped-query attention. ``qkv`` has q rows first, then k, then v. ``window`` W: j is seen iff 0 <= i - j < W."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    qkv: LinearSpec
    out: LinearSpec
    rope: Rope | None
    window: int | None = None
    q_norm: RMSNormSpec | None = None
    k_norm: RMSNormSpec | None = None


@dataclass(frozen=True, kw_only=True)
class GatedMLP:
    """down(act(gate(x)) * up(x)). ``gate_up`` has the gate rows first (Shazeer 2020, GLU variants)."""

    gate_up: LinearSpec
    down: LinearSpec
    activation: Activation


@dataclass(frozen=True, kw_only=True)
class MLP:
    """down(act(up(x)))."""

    up: LinearSpec
    down: LinearSpec
    activation: Activation


FFN = GatedMLP | MLP


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """A pre-norm residual block: x += attention(norm(x)); x += ffn(norm(x))."""

    attention: GQA
    ffn: FFN
    attention_norm: NormSpec
    ffn_norm: NormSpec


@dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """Everything the decoder is, and nothing about how it is trained, stored or run.

    ``max_positions`` is the context the checkpoint states; ``learned_positions`` is the size of a learned position
    table (None: positions enter by rope). ``tied``: the head is the embedding table. ``init_std``: deviation of fresh
    weights.
    """

    vocab_size: int
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    final_norm: NormSpec
    tied: bool
    max_positions: int
    embedding_scale: float | None = None
    learned_positions: int | None = None
    init_std: float = 0.02


def linear_specs(spec: DecoderSpec) -> Iterator[tuple[str, LinearSpec]]:
    """Every linear map of the layers with its module path (``layers.3.attention.qkv``)."""
    for index, layer in enumerate(spec.layers):
        for name, linear in _linears_of(layer):
            yield f"layers.{index}.{name}", linear


def rewrite_linears(spec: DecoderSpec, rule: Callable[[str, LinearSpec], LinearSpec]) -> DecoderSpec:
    """A copy of ``spec`` with each linear map of the layers replaced by ``rule(path, linear)``."""

    def rewritten(layer: LayerSpec, index: int) -> LayerSpec:
        new = {name: rule(f"layers.{index}.{name}", old) for name, old in _linears_of(layer)}
        attention = replace(layer.attention, qkv=new["attention.qkv"], out=new["attention.out"])
        ffn: FFN
        match layer.ffn:
            case GatedMLP():
                ffn = replace(layer.ffn, gate_up=new["ffn.gate_up"], down=new["ffn.down"])
            case MLP():
                ffn = replace(layer.ffn, up=new["ffn.up"], down=new["ffn.down"])
        return replace(layer, attention=attention, ffn=ffn)

    return replace(spec, layers=tuple(rewritten(layer, index) for index, layer in enumerate(spec.layers)))


def _linears_of(layer: LayerSpec) -> Iterator[tuple[str, LinearSpec]]:
    yield "attention.qkv", layer.attention.qkv
    yield "attention.out", layer.attention.out
    match layer.ffn:
        case GatedMLP():
            yield "ffn.gate_up", layer.ffn.gate_up
            yield "ffn.down", layer.ffn.down
        case MLP():
            yield "ffn.up", layer.ffn.up
            yield "ffn.down", layer.ffn.down
