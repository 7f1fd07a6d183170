"""GGUF tables of GPT-2 and its relatives with LayerNorm and plain MLP, and of the original Qwen.

Source: llama.cpp's conversion/gpt2.py, bloom.py, falcon.py, starcoder.py, qwen.py.
"""

from __future__ import annotations

from typing import Any

from oarsmith.checkpoint.gguf.arch_llama import EMBEDDING, HEAD, WINDOW, attention, note_window, top
from oarsmith.checkpoint.gguf.family import GELU, LAYER, RMS, Config, Dims, Family, Fixed, Notes
from oarsmith.checkpoint.gguf.links import KEEP, TRANSPOSE, Change, Link, group_rows, in_layers, linear, link, norm
from oarsmith.checkpoint.gguf.metadata import Metadata
from oarsmith.checkpoint.gguf.rope import RopeStyle


def _gpt2_links(config: Config, dims: Dims) -> list[Link]:
    layer = [
        *norm("attn_norm", "ln_1", bias=True),
        *linear("attn_qkv", "attn.c_attn", "qkv hidden", TRANSPOSE, bias=True),
        *linear("attn_output", "attn.c_proj", "hidden q", TRANSPOSE, bias=True),
        *norm("ffn_norm", "ln_2", bias=True),
        *linear("ffn_up", "mlp.c_fc", "ffn hidden", TRANSPOSE, bias=True),
        *linear("ffn_down", "mlp.c_proj", "hidden ffn", TRANSPOSE, bias=True),
    ]
    return [
        link(EMBEDDING, "transformer.wte.weight", "vocab hidden"),
        link("position_embd.weight", "transformer.wpe.weight", "context hidden"),
        *norm("output_norm", "transformer.ln_f", bias=True),
        link(HEAD, "lm_head.weight", "vocab hidden", required=False),
        *in_layers("transformer.h.", layer, range(dims["layers"])),
    ]


def _grouped(dims: Dims) -> Change:
    return group_rows(dims["kv_heads"], dims["heads"] // dims["kv_heads"], dims["head"])


def _bloom_links(config: Config, dims: Dims) -> list[Link]:
    layer = [
        *norm("attn_norm", "input_layernorm", bias=True),
        *linear("attn_qkv", "self_attention.query_key_value", "qkv hidden", _grouped(dims), bias=True),
        *linear("attn_output", "self_attention.dense", "hidden q", bias=True),
        *norm("ffn_norm", "post_attention_layernorm", bias=True),
        *linear("ffn_up", "mlp.dense_h_to_4h", "ffn hidden", bias=True),
        *linear("ffn_down", "mlp.dense_4h_to_h", "hidden ffn", bias=True),
    ]
    return [
        link(EMBEDDING, "transformer.word_embeddings.weight", "vocab hidden"),
        *norm("token_embd_norm", "transformer.word_embeddings_layernorm", bias=True),
        *norm("output_norm", "transformer.ln_f", bias=True),
        link(HEAD, "lm_head.weight", "vocab hidden", required=False),
        *in_layers("transformer.h.", layer, range(dims["layers"])),
    ]


def _falcon_links(config: Config, dims: Dims) -> list[Link]:
    two_norms = config.get("num_ln_in_parallel_attn", 2 if config.get("new_decoder_architecture", False) else 1) == 2
    layer = [
        *norm("attn_norm", "ln_mlp" if two_norms else "input_layernorm", bias=True),
        *(norm("attn_norm_2", "ln_attn", bias=True) if two_norms else []),
        *linear("attn_qkv", "self_attention.query_key_value", "qkv hidden", _grouped(dims), bias=False),
        *linear("attn_output", "self_attention.dense", "hidden q", bias=False),
        *linear("ffn_up", "mlp.dense_h_to_4h", "ffn hidden", bias=False),
        *linear("ffn_down", "mlp.dense_4h_to_h", "hidden ffn", bias=False),
    ]
    return [
        link(EMBEDDING, "transformer.word_embeddings.weight", "vocab hidden"),
        *norm("output_norm", "transformer.ln_f", bias=True),
        link(HEAD, "lm_head.weight", "vocab hidden", required=False),
        *in_layers("transformer.h.", layer, range(dims["layers"])),
    ]


def _falcon_sizes(config: Config, dims: Dims) -> None:
    if config.get("new_decoder_architecture", False):
        dims["kv_heads"] = config.whole("num_kv_heads", "n_head_kv", default=dims["heads"])
    else:  # whatever num_kv_heads says
        dims["kv_heads"] = 1 if config.get("multi_query", True) else dims["heads"]


def _falcon_read(metadata: Metadata, config: dict[str, Any]) -> None:
    kv_heads, two_norms = config["num_kv_heads"], metadata.has("blk.0.attn_norm_2.weight")
    config["new_decoder_architecture"] = two_norms or kv_heads > 1
    config["multi_query"] = True
    config["num_ln_in_parallel_attn"] = 2 if two_norms else 1


def _starcoder2_links(config: Config, dims: Dims) -> list[Link]:
    layer = [
        *norm("attn_norm", "input_layernorm", bias=True),
        *attention(dims, bias=True),
        *norm("ffn_norm", "post_attention_layernorm", bias=True),
        *linear("ffn_up", "mlp.c_fc", "ffn hidden", bias=True),
        *linear("ffn_down", "mlp.c_proj", "hidden ffn", bias=True),
    ]
    bias = link("output_norm.bias", "model.norm.bias", "hidden")
    return [*top(), bias, *in_layers("model.layers.", layer, range(dims["layers"]))]


def _qwen_links(config: Config, dims: Dims) -> list[Link]:
    layer = [
        *norm("attn_norm", "ln_1"),
        *linear("attn_qkv", "attn.c_attn", "qkv hidden", bias=True),
        *linear("attn_output", "attn.c_proj", "hidden q", bias=False),
        *norm("ffn_norm", "ln_2"),
        *linear("ffn_gate", "mlp.w2", "ffn hidden", bias=False),  # the activation is on w2
        *linear("ffn_up", "mlp.w1", "ffn hidden", bias=False),
        *linear("ffn_down", "mlp.c_proj", "hidden ffn", bias=False),
    ]
    return [
        link(EMBEDDING, "transformer.wte.weight", "vocab hidden"),
        *norm("output_norm", "transformer.ln_f"),
        link(HEAD, "lm_head.weight", "vocab hidden", KEEP, required=False),
        *in_layers("transformer.h.", layer, range(dims["layers"])),
    ]


def _qwen_sizes(config: Config, dims: Dims) -> None:
    dims["ffn"] //= 2  # both sides call twice the real width by this name
    if config.get("use_dynamic_ntk", False) or config.get("use_logn_attn", False):
        dims["context"] = config.whole("seq_length", default=dims["context"])


def _qwen_read(metadata: Metadata, config: dict[str, Any]) -> None:
    config |= {"seq_length": config["max_position_embeddings"], "use_dynamic_ntk": False, "use_logn_attn": False}


def _qwen_write(config: Config, dims: Dims, metadata: dict[str, Any], notes: Notes) -> None:
    metadata["feed_forward_length"] = 2 * dims["ffn"]
    if config.get("use_dynamic_ntk", False) or config.get("use_logn_attn", False):
        notes.append(
            "llama.cpp has neither dynamic NTK nor log-n attention: same results up to "
            f"{dims['context']} tokens, which the file names as context length; read back, both are off"
        )


FAMILIES = (
    Family(
        arch="gpt2",
        model_type="gpt2",
        class_name="GPT2LMHeadModel",
        links=_gpt2_links,
        spelling={
            "layers": "n_layer",
            "hidden": "n_embd",
            "ffn": "n_inner",
            "heads": "n_head",
            "kv_heads": None,
            "head": None,
            "context": "n_positions",
        },
        epsilon=(LAYER, "layer_norm_epsilon"),
        epsilon_default=1e-5,
        rope=None,
        fixed=(
            Fixed("activation_function", "gelu_new", accepts=GELU),
            Fixed("scale_attn_weights", True),
            Fixed("scale_attn_by_inverse_layer_idx", False),
        ),
        tied=True,
    ),
    Family(
        arch="bloom",
        model_type="bloom",
        class_name="BloomForCausalLM",
        links=_bloom_links,
        spelling={
            "layers": "n_layer",
            "ffn": None,
            "heads": "n_head",
            "kv_heads": None,
            "head": None,
            "context": "seq_length",
        },
        epsilon=(LAYER, "layer_norm_epsilon"),
        epsilon_default=1e-5,
        rope=None,
        fixed=(Fixed("apply_residual_connection_post_layernorm", False),),
        tied=True,
        knows=("attention.max_alibi_bias",),
    ),
    Family(
        arch="falcon",
        model_type="falcon",
        class_name="FalconForCausalLM",
        links=_falcon_links,
        spelling={"ffn": "ffn_hidden_size", "kv_heads": "num_kv_heads", "head": None},
        epsilon=(LAYER, "layer_norm_epsilon"),
        epsilon_default=1e-5,
        fixed=(
            Fixed("activation", "gelu", accepts=GELU),
            Fixed("alibi", False),
            Fixed("parallel_attn", True),
            Fixed("bias", False),
        ),
        tied=True,
        sizes=_falcon_sizes,
        read=_falcon_read,
    ),
    Family(
        arch="starcoder2",
        model_type="starcoder2",
        class_name="Starcoder2ForCausalLM",
        links=_starcoder2_links,
        spelling={"head": None},
        epsilon=(LAYER, "norm_epsilon"),
        epsilon_default=1e-5,
        fields=(WINDOW,),
        fixed=(Fixed("hidden_act", "gelu_pytorch_tanh", accepts=GELU), Fixed("use_bias", True)),
        tied=True,
        write=note_window,
    ),
    Family(
        arch="qwen",
        model_type="qwen",
        class_name="QWenLMHeadModel",
        links=_qwen_links,
        spelling={"kv_heads": None, "head": "kv_channels"},
        epsilon=(RMS, "layer_norm_epsilon"),
        epsilon_default=1e-6,
        rope=RopeStyle(theta="rotary_emb_base"),
        fixed=(Fixed("rotary_pct", 1.0), Fixed("no_bias", True)),
        stores_tied_head=True,
        sizes=_qwen_sizes,
        read=_qwen_read,
        write=_qwen_write,
    ),
)
