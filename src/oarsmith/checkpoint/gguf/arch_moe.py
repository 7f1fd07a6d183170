"""GGUF tables of the families with experts: Mixtral, Qwen2-MoE, Qwen3-MoE, gpt-oss, DeepSeek-V2 and V3.

Source: llama.cpp's conversion/llama.py, qwen.py, gpt_oss.py, deepseek.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from oarsmith.checkpoint.gguf.arch_llama import SILU, WINDOW, attention, note_window, pre_norms, qk_norms, top
from oarsmith.checkpoint.gguf.family import Config, Dims, Family, Field, Fixed, Notes
from oarsmith.checkpoint.gguf.links import ROW, TRANSPOSE, Link, in_layers, interleaved, linear, link, norm
from oarsmith.checkpoint.gguf.metadata import Metadata

_TRUNCATE = "rope.scaling.yarn_truncate"
USED = Field("expert_used_count", "num_experts_per_tok", int)


def experts(prefix: str, names: tuple[str, str, str], ffn: str = "expert_ffn") -> list[Link]:
    """Routed experts, one tensor each in config.json's model: gate, up and down."""
    shapes = (f"experts {ffn} hidden", f"experts {ffn} hidden", f"experts hidden {ffn}")
    kinds = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
    return [
        link(f"{kind}.weight", f"{prefix}.{{e}}.{name}.weight", shape)
        for kind, name, shape in zip(kinds, names, shapes, strict=True)
    ]


def shared_expert(prefix: str) -> list[Link]:
    return [
        link("ffn_gate_shexp.weight", f"{prefix}.gate_proj.weight", "shared_ffn hidden"),
        link("ffn_up_shexp.weight", f"{prefix}.up_proj.weight", "shared_ffn hidden"),
        link("ffn_down_shexp.weight", f"{prefix}.down_proj.weight", "hidden shared_ffn"),
    ]


def _mixtral_links(config: Config, dims: Dims) -> list[Link]:
    layer = [
        *pre_norms(),
        *attention(dims, permuted=True, bias=False),
        link("ffn_gate_inp.weight", "block_sparse_moe.gate.weight", "experts hidden"),
        *experts("block_sparse_moe.experts", ("w1", "w3", "w2"), "ffn"),
    ]
    return [*top(), *in_layers("model.layers.", layer, range(dims["layers"]))]


def _qwen_moe_links(*, shared: bool) -> Callable[[Config, Dims], list[Link]]:
    def links(config: Config, dims: Dims) -> list[Link]:
        layer = [
            *pre_norms(),
            *attention(dims, bias=None),
            link("ffn_gate_inp.weight", "mlp.gate.weight", "experts hidden"),
            *experts("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
        ]
        if shared:
            layer += shared_expert("mlp.shared_expert")
            layer.append(link("ffn_gate_inp_shexp.weight", "mlp.shared_expert_gate.weight", "hidden", ROW))
        else:
            layer += qk_norms()
        return [*top(), *in_layers("model.layers.", layer, range(dims["layers"]))]

    return links


def _mixtral_sizes(config: Config, dims: Dims) -> None:
    dims["experts"] = config.whole("num_local_experts", "num_experts", default=8)


def _qwen_sizes(config: Config, dims: Dims) -> None:
    dims["experts"] = config.whole("num_experts", "num_local_experts")
    dims["expert_ffn"] = config.whole("moe_intermediate_size")
    dims["shared_ffn"] = config.whole("shared_expert_intermediate_size", default=0)


def _qwen_read(metadata: Metadata, config: dict[str, Any]) -> None:
    config["attention_bias" if config["model_type"] == "qwen3_moe" else "qkv_bias"] = metadata.has("blk.0.attn_q.bias")
    gate = metadata.file.tensors.get("blk.0.ffn_gate_exps.weight")
    # Files from before the key existed: the tensor says it.
    if gate is not None and len(gate.shape) == 3:
        config.setdefault("moe_intermediate_size", gate.shape[1])


def _qwen_write(config: Config, dims: Dims, metadata: dict[str, Any], notes: Notes) -> None:
    if config.get("mlp_only_layers"):
        raise config.error("mlp_only_layers", "llama.cpp has experts in every layer of this family")
    if config.get("use_sliding_window", False):
        note_window(config, dims, metadata, notes)


def _gpt_oss_links(config: Config, dims: Dims) -> list[Link]:
    both = ("ffn_gate_exps", "ffn_up_exps")
    layer = [
        *norm("attn_norm", "input_layernorm"),
        *norm("post_attention_norm", "post_attention_layernorm"),
        *attention(dims, bias=True),
        link("attn_sinks.weight", "self_attn.sinks", "heads"),
        *linear("ffn_gate_inp", "mlp.router", "experts hidden", bias=True),
        link(
            [f"{name}.weight" for name in both],
            "mlp.experts.gate_up_proj",
            ["experts ffn hidden"] * 2,
            interleaved(transposed=True),
        ),
        link(
            [f"{name}.bias" for name in both],
            "mlp.experts.gate_up_proj_bias",
            ["experts ffn"] * 2,
            interleaved(transposed=False),
        ),
        link("ffn_down_exps.weight", "mlp.experts.down_proj", "experts hidden ffn", TRANSPOSE),
        link("ffn_down_exps.bias", "mlp.experts.down_proj_bias", "experts hidden"),
    ]
    return [*top(), *in_layers("model.layers.", layer, range(dims["layers"]))]


def _gpt_oss_types(num_layers: int) -> list[str]:
    return ["full_attention" if index % 2 else "sliding_attention" for index in range(num_layers)]


def _gpt_oss_read(metadata: Metadata, config: dict[str, Any]) -> None:
    config["layer_types"] = _gpt_oss_types(config["num_hidden_layers"])
    config["attention_bias"] = True
    scaling = config.setdefault("rope_scaling", {"rope_type": "default"})  # left out it would mean YaRN
    if scaling["rope_type"] == "yarn":
        # False in every released model, and llama.cpp has no key for it; in files written here it stands.
        scaling["truncate"] = bool(metadata.optional(_TRUNCATE) or False)


def _truncates(config: Config) -> bool:
    scaling = config.get("rope_parameters", config.get("rope_scaling", {}))
    return bool(scaling.get("truncate", True))


def _gpt_oss_write(config: Config, dims: Dims, metadata: dict[str, Any], notes: Notes) -> None:
    types = _gpt_oss_types(dims["layers"])
    if config.get("layer_types", types) != types:
        raise config.error("layer_types", "llama.cpp makes every second layer a full one, beginning with a sliding one")
    metadata["expert_feed_forward_length"] = dims["ffn"]
    if metadata.get("rope.scaling.type") == "yarn":
        metadata[_TRUNCATE] = _truncates(config)
    if not metadata.get(_TRUNCATE, True):
        notes.append("llama.cpp rounds the bounds of YaRN's ramp, this model does not: logits differ slightly")


FAMILIES = (
    Family(
        arch="llama",
        model_type="mixtral",
        class_name="MixtralForCausalLM",
        links=_mixtral_links,
        fields=(Field("expert_count", "num_local_experts", int, 8, other="num_experts"), USED, WINDOW),
        fixed=(SILU,),
        matches=lambda metadata: bool(metadata.optional("expert_count")),
        sizes=_mixtral_sizes,
        write=note_window,
    ),
    Family(
        arch="qwen2moe",
        model_type="qwen2_moe",
        class_name="Qwen2MoeForCausalLM",
        links=_qwen_moe_links(shared=True),
        spelling={"head": None},
        fields=(
            Field("expert_count", "num_experts", int, other="num_local_experts"),
            USED,
            Field("expert_feed_forward_length", "moe_intermediate_size", int, optional=True),
            Field("expert_shared_feed_forward_length", "shared_expert_intermediate_size", int),
        ),
        fixed=(
            SILU,
            Fixed("norm_topk_prob", False),
            Fixed("decoder_sparse_step", 1),
            Fixed("use_sliding_window", False, (True,)),
        ),
        stores_tied_head=True,
        sizes=_qwen_sizes,
        read=_qwen_read,
        write=_qwen_write,
    ),
    Family(
        arch="qwen3moe",
        model_type="qwen3_moe",
        class_name="Qwen3MoeForCausalLM",
        links=_qwen_moe_links(shared=False),
        fields=(
            Field("expert_count", "num_experts", int, other="num_local_experts"),
            USED,
            Field("expert_feed_forward_length", "moe_intermediate_size", int, optional=True),
        ),
        fixed=(
            SILU,
            Fixed("norm_topk_prob", True, default=False),
            Fixed("decoder_sparse_step", 1),
            Fixed("use_sliding_window", False, (True,)),
        ),
        sizes=_qwen_sizes,
        read=_qwen_read,
        write=_qwen_write,
    ),
    Family(
        arch="gpt-oss",
        model_type="gpt_oss",
        class_name="GptOssForCausalLM",
        links=_gpt_oss_links,
        epsilon_default=1e-5,
        fields=(
            Field("expert_count", "num_local_experts", int, other="num_experts"),
            USED,
            Field("attention.sliding_window", "sliding_window", int, 128),
        ),
        fixed=(SILU, Fixed("swiglu_limit", 7.0), Fixed("swiglu_alpha", 1.702)),
        stores_tied_head=True,
        sizes=_mixtral_sizes,
        read=_gpt_oss_read,
        write=_gpt_oss_write,
    ),
)
