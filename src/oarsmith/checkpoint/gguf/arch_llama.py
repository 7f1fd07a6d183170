"""GGUF tables of the families built like LLaMA: separate or fused q, k, v and a gated MLP.

Source of names and changes: llama.cpp's conversion scripts (conversion/llama.py, qwen.py, granite.py, ...).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from oarsmith.checkpoint.gguf.family import LAYER, Config, Dims, Family, Field, Fixed, Notes
from oarsmith.checkpoint.gguf.links import (
    KEEP,
    Change,
    Link,
    group_rows,
    in_layers,
    linear,
    link,
    norm,
    permute,
)
from oarsmith.checkpoint.gguf.metadata import Metadata

SILU = Fixed("hidden_act", "silu", accepts=("swish",))
WINDOW = Field("attention.sliding_window", "sliding_window", int, optional=True)
HEAD = "output.weight"
EMBEDDING = "token_embd.weight"


def top(prefix: str = "model.", change: Change = KEEP, embedding: str = "embed_tokens") -> list[Link]:
    """Embedding, last norm and head."""
    return [
        link(EMBEDDING, f"{prefix}{embedding}.weight", "vocab hidden"),
        *norm("output_norm", f"{prefix}norm", change=change),
        link(HEAD, "lm_head.weight", "vocab hidden", required=False),
    ]


def attention(dims: Dims, *, permuted: bool = False, bias: bool | None = None) -> list[Link]:
    """Separate q, k, v and o. ``permuted``: llama.cpp rotates adjacent pairs, config.json's model halves."""
    return [
        *linear("attn_q", "self_attn.q_proj", "q hidden", permute(dims["heads"]) if permuted else KEEP, bias=bias),
        *linear("attn_k", "self_attn.k_proj", "kv hidden", permute(dims["kv_heads"]) if permuted else KEEP, bias=bias),
        *linear("attn_v", "self_attn.v_proj", "kv hidden", bias=bias),
        *linear("attn_output", "self_attn.o_proj", "hidden q", bias=bias),
    ]


def gated_mlp(bias: bool | None = False) -> list[Link]:
    """gate, up and down."""
    return [
        *linear("ffn_gate", "mlp.gate_proj", "ffn hidden", bias=bias),
        *linear("ffn_up", "mlp.up_proj", "ffn hidden", bias=bias),
        *linear("ffn_down", "mlp.down_proj", "hidden ffn", bias=bias),
    ]


def fused_mlp(gate_up: str, down: str) -> list[Link]:
    """gate and up as one tensor, which llama.cpp calls up."""
    return [
        link("ffn_up.weight", f"{gate_up}.weight", "gate_up hidden"),
        link("ffn_down.weight", f"{down}.weight", "hidden ffn"),
    ]


def with_gate_up(config: Config, dims: Dims) -> None:
    dims["gate_up"] = 2 * dims["ffn"]


def pre_norms(change: Change = KEEP) -> list[Link]:
    return [
        *norm("attn_norm", "input_layernorm", change=change),
        *norm("ffn_norm", "post_attention_layernorm", change=change),
    ]


def qk_norms(q: str = "head", k: str = "head", change: Change = KEEP) -> list[Link]:
    return [
        *norm("attn_q_norm", "self_attn.q_norm", q, change),
        *norm("attn_k_norm", "self_attn.k_norm", k, change),
    ]


def _llama_like(
    *, permuted: bool = False, biases: bool = False, extra: Callable[[], list[Link]] = list
) -> Callable[[Config, Dims], list[Link]]:
    optional = None if biases else False

    def links(config: Config, dims: Dims) -> list[Link]:
        layer = [*pre_norms(), *attention(dims, permuted=permuted, bias=None), *gated_mlp(optional), *extra()]
        return [*top(), *in_layers("model.layers.", layer, range(dims["layers"]))]

    return links


def _olmo2_links(config: Config, dims: Dims) -> list[Link]:
    layer = [
        *attention(dims, bias=False),
        *qk_norms("q", "kv"),
        *gated_mlp(),
        *norm("post_attention_norm", "post_attention_layernorm"),
        *norm("post_ffw_norm", "post_feedforward_layernorm"),
    ]
    return [*top(), *in_layers("model.layers.", layer, range(dims["layers"]))]


def _cohere_links(config: Config, dims: Dims) -> list[Link]:
    layer = [*norm("attn_norm", "input_layernorm"), *attention(dims, bias=False), *gated_mlp()]
    if config.get("use_qk_norm", False):
        layer += qk_norms("heads head", "kv_heads head")
    return [*top(), *in_layers("model.layers.", layer, range(dims["layers"]))]


def _internlm2_links(config: Config, dims: Dims) -> list[Link]:
    heads, groups = dims["heads"], dims["kv_heads"]
    change = group_rows(groups, heads // groups, dims["head"], (permute(heads), permute(groups), KEEP))
    layer = [
        *norm("attn_norm", "attention_norm"),
        *norm("ffn_norm", "ffn_norm"),
        link(
            ("attn_q.weight", "attn_k.weight", "attn_v.weight"),
            "attention.wqkv.weight",
            ("q hidden", "kv hidden", "kv hidden"),
            change,
        ),
        link("attn_output.weight", "attention.wo.weight", "hidden q"),
        link("ffn_gate.weight", "feed_forward.w1.weight", "ffn hidden"),
        link("ffn_up.weight", "feed_forward.w3.weight", "ffn hidden"),
        link("ffn_down.weight", "feed_forward.w2.weight", "hidden ffn"),
    ]
    names = top(embedding="tok_embeddings")
    names[-1] = link(HEAD, "output.weight", "vocab hidden", required=False)
    return [*names, *in_layers("model.layers.", layer, range(dims["layers"]))]


def note_window(config: Config, dims: Dims, metadata: dict[str, Any], notes: Notes) -> None:
    """llama.cpp reads no window for these architectures; the key is written all the same, for the way back."""
    window = config.get("sliding_window")
    if window and config.get("use_sliding_window", True) and window < dims["context"]:
        notes.append(f"llama.cpp ignores this family's sliding window: same results up to {window} tokens")


def _read_biases(metadata: Metadata, config: dict[str, Any]) -> None:
    config["attention_bias"] = metadata.has("blk.0.attn_q.bias")
    config["mlp_bias"] = metadata.has("blk.0.ffn_gate.bias")
    for first, second in (("attn_q", "attn_output"), ("ffn_gate", "ffn_down")):
        if metadata.has(f"blk.0.{first}.bias") != metadata.has(f"blk.0.{second}.bias"):
            raise metadata.error(second, f"{first} and {second} must both have a bias, or neither")


def _read_attention_bias(metadata: Metadata, config: dict[str, Any]) -> None:
    config["attention_bias"] = metadata.has("blk.0.attn_q.bias")


def _qwen2_write(config: Config, dims: Dims, metadata: dict[str, Any], notes: Notes) -> None:
    if config.get("use_sliding_window", False):
        note_window(config, dims, metadata, notes)


def _smollm3_write(config: Config, dims: Dims, metadata: dict[str, Any], notes: Notes) -> None:
    expected = [int((index + 1) % 4 != 0) for index in range(dims["layers"])]
    if config.get("no_rope_layers", expected) != expected:
        raise config.error("no_rope_layers", "llama.cpp leaves out the rotary embedding in every fourth layer, always")


def _cohere_read(metadata: Metadata, config: dict[str, Any]) -> None:
    config["use_qk_norm"] = metadata.has("blk.0.attn_q_norm.weight")


def _cohere_write(config: Config, dims: Dims, metadata: dict[str, Any], notes: Notes) -> None:
    if config.get("use_qk_norm", False) != (dims["layers"] >= 64):
        raise config.error("use_qk_norm", "llama.cpp has q and k norms in models of 64 layers and more, and only there")


def _cohere_sizes(config: Config, dims: Dims) -> None:
    # Command-R says 8,192 in max_position_embeddings and the length it was trained on in model_max_length.
    dims["context"] = config.whole("model_max_length", default=dims["context"])


_NO_HEAD: Mapping[str, str | None] = {"head": None}
_NO_WINDOW = Fixed("use_sliding_window", False)

FAMILIES = (
    Family(
        arch="llama",
        model_type="mistral",
        class_name="MistralForCausalLM",
        links=_llama_like(permuted=True),
        fields=(WINDOW,),
        fixed=(SILU,),
        matches=lambda metadata: bool(metadata.optional("attention.sliding_window")),
        write=note_window,
    ),
    Family(
        arch="llama",
        model_type="llama",
        class_name="LlamaForCausalLM",
        links=_llama_like(permuted=True, biases=True),
        fixed=(SILU,),
        epsilon_default=1e-6,
        read=_read_biases,
    ),
    Family(
        arch="qwen2",
        model_type="qwen2",
        class_name="Qwen2ForCausalLM",
        links=_llama_like(),
        fixed=(SILU, Fixed("use_sliding_window", False, accepts=(True,))),
        write=_qwen2_write,
    ),
    Family(
        arch="qwen3",
        model_type="qwen3",
        class_name="Qwen3ForCausalLM",
        links=_llama_like(extra=qk_norms),
        fixed=(SILU, Fixed("use_sliding_window", False, accepts=(True,))),
        read=_read_attention_bias,
        write=_qwen2_write,
    ),
    Family(
        arch="granite",
        model_type="granite",
        class_name="GraniteForCausalLM",
        links=_llama_like(permuted=True, biases=True),
        spelling=_NO_HEAD,
        fields=(
            Field("attention.scale", "attention_multiplier", float, 1.0),
            Field("embedding_scale", "embedding_multiplier", float, 1.0),
            Field("residual_scale", "residual_multiplier", float, 1.0),
            Field("logit_scale", "logits_scaling", float, 1.0),
        ),
        fixed=(SILU,),
        read=_read_biases,
    ),
    Family(
        arch="smollm3",
        model_type="smollm3",
        class_name="SmolLM3ForCausalLM",
        links=_llama_like(permuted=True),
        spelling=_NO_HEAD,
        fixed=(SILU, _NO_WINDOW, Fixed("no_rope_layer_interval", 4)),
        tied=True,
        write=_smollm3_write,
    ),
    Family(
        arch="olmo2",
        model_type="olmo2",
        class_name="Olmo2ForCausalLM",
        links=_olmo2_links,
        spelling=_NO_HEAD,
        fixed=(SILU,),
    ),
    Family(
        arch="command-r",
        model_type="cohere",
        class_name="CohereForCausalLM",
        links=_cohere_links,
        spelling=_NO_HEAD,
        epsilon=(LAYER, "layer_norm_eps"),
        epsilon_default=1e-5,
        fields=(Field("logit_scale", "logit_scale", float, 0.0625),),
        fixed=(SILU,),
        tied=True,
        sizes=_cohere_sizes,
        read=_cohere_read,
        write=_cohere_write,
    ),
    Family(
        arch="internlm2",
        model_type="internlm2",
        class_name="InternLM2ForCausalLM",
        links=_internlm2_links,
        spelling=_NO_HEAD,
        fixed=(SILU, Fixed("bias", False)),
        stores_tied_head=True,
    ),
)
