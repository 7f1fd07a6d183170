"""Building blocks that families share: projections, attention, feed-forward, the whole decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from oarsmith.errors import ModelError
from oarsmith.models.families.base import ConfigReader
from oarsmith.models.families.rope import context_length
from oarsmith.models.spec import (
    DecoderSpec,
    EmbeddingSpec,
    HeadSpec,
    LayerSpec,
    NormedStream,
    PreNorm,
    Residual,
    Sequential,
)
from oarsmith.models.spec_parts import (
    GQA,
    Activation,
    ClampedSwiGLU,
    GatedMLP,
    LinearSpec,
    NormSpec,
    QKNorm,
    Segment,
)
from oarsmith.models.spec_position import Alibi, Position


def fused(in_features: int, *segments: tuple[str, int], bias: bool = False, experts: int | None = None) -> LinearSpec:
    """A linear map whose output rows are the named segments in order."""
    named = tuple(Segment(name=name, size=size) for name, size in segments)
    return LinearSpec(in_features=in_features, segments=named, bias=bias, experts=experts)


def head_counts(read: ConfigReader, head_dim: int | None = None) -> tuple[int, int, int]:
    """(query heads, kv heads, head dim) with the field's defaults and their consistency checked."""
    hidden, heads = read.integer("hidden_size"), read.integer("num_attention_heads")
    kv_heads = read.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ModelError(f"{heads} heads cannot be shared by {kv_heads} key/value heads", where="config.json")
    if head_dim is None and read.config.get("head_dim") is None and hidden % heads:
        raise ModelError(f"hidden_size {hidden} is not a multiple of {heads} heads", where="config.json")
    return heads, kv_heads, read.integer("head_dim", head_dim or hidden // heads)


def attention(
    read: ConfigReader,
    position: Position | None,
    *,
    head_dim: int | None = None,
    bias: bool = False,
    out_bias: bool = False,
    qk_norm: QKNorm | None = None,
    packed: str | None = None,
    out: str = "o_proj",
) -> GQA:
    """Attention with q_proj, k_proj and v_proj, or with one ``packed`` projection of the same rows."""
    hidden = read.integer("hidden_size")
    heads, kv_heads, dim = head_counts(read, head_dim)
    q, kv = heads * dim, kv_heads * dim
    rows = [("q_proj", q), ("k_proj", kv), ("v_proj", kv)] if packed is None else [(packed, q + 2 * kv)]
    return GQA(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        scale=dim**-0.5,
        qkv=fused(hidden, *rows, bias=bias),
        out=fused(q, (out, hidden), bias=out_bias),
        position=position,
        qk_norm=qk_norm,
    )


def gated_mlp(
    hidden: int,
    inner: int,
    activation: Activation | ClampedSwiGLU,
    *,
    names: Sequence[str] = ("gate_proj", "up_proj", "down_proj"),
    bias: bool = False,
    experts: int | None = None,
) -> GatedMLP:
    """``names``: gate, up and down, or the fused gate and up, and down."""
    *rows, down = names
    sizes = [(name, 2 * inner // len(rows)) for name in rows]
    return GatedMLP(
        gate_up=fused(hidden, *sizes, bias=bias, experts=experts),
        down=fused(inner, (down, hidden), bias=bias, experts=experts),
        activation=activation,
    )


def decoder(
    read: ConfigReader,
    layers: Sequence[LayerSpec],
    final_norm: NormSpec | None,
    *,
    tied: bool = False,
    embedding: EmbeddingSpec | None = None,
    head: HeadSpec | None = None,
    max_positions: int | None = None,
    padding: int | None = None,
) -> DecoderSpec:
    """The whole, with the keys that most configs share.

    Args:
        tied: whether head and embedding are one where the config does not say.
        embedding: where it is more than a table, or one whose padding row learns like any other.
        head: where it is more than a matrix; its ``tied`` is read from the config too.
        padding: ``pad_token_id`` where the config does not say.
    """
    hidden = read.integer("hidden_size")
    head = head or HeadSpec(tied=tied)
    longest = max_positions or context_length(read)
    if any(isinstance(layer.attention.position, Alibi) for layer in layers):
        # ALiBi is made to be used beyond the trained length: perplexity falls until about twice that (Press et al.
        # 2022, section 3.1), and stays there for a while.
        longest *= 2
    return DecoderSpec(
        vocab_size=read.integer("vocab_size"),
        hidden_size=hidden,
        embedding=embedding or EmbeddingSpec(size=hidden, padding_id=padding_row(read, padding)),
        layers=tuple(layers),
        final_norm=final_norm,
        head=replace(head, tied=read.flag("tie_word_embeddings", tied)),
        max_positions=longest,
        init_std=read.number("initializer_range", 0.02),
    )


def padding_row(read: ConfigReader, default: int | None = None) -> int | None:
    """``pad_token_id``, whose embedding row gets no gradient from the input in the authors' code; null means none.

    Args:
        default: where the key is missing; the default of a family's large vocabulary means none in a smaller one.
    """
    size = read.integer("vocab_size")
    if "pad_token_id" not in read.config:
        return default if default is not None and default < size else None
    value = read.config["pad_token_id"]
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not -size <= value < size:
        raise ModelError(
            f"pad_token_id {value!r} is outside the vocabulary of {size}",
            where="config.json",
            fix="set it to null if the model has no padding token",
        )
    return value % size


def residual_rule(read: ConfigReader, norm: NormSpec) -> Sequential:
    """Pre-norm; the normed input goes on with ``apply_residual_connection_post_layernorm`` (Megatron's option)."""
    rule: Residual = PreNorm(norm=norm)
    if read.flag("apply_residual_connection_post_layernorm", False):
        rule = NormedStream(norm=norm)
    return Sequential(attention=rule, ffn=rule)


def window_size(read: ConfigReader) -> int | None:
    """``sliding_window``: null means none, a missing key the 4096 that the families' own defaults say."""
    return read.optional_integer("sliding_window") if "sliding_window" in read.config else 4096


def layer_windows(read: ConfigReader, window: int | None, slides: Callable[[int], bool]) -> list[int | None]:
    """Each layer's sliding window: from ``layer_types`` where stated, else the layers that ``slides`` picks."""
    num_layers = read.integer("num_hidden_layers")
    types = read.config.get("layer_types")
    if types is None:
        return [window if slides(index) else None for index in range(num_layers)]
    if len(types) != num_layers or set(types) - {"full_attention", "sliding_attention"}:
        raise ModelError(f"layer_types {types!r} does not describe {num_layers} layers", where="config.json")
    return [window if kind == "sliding_attention" else None for kind in types]
