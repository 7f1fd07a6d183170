"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm, GELU, biases, weights stored as Conv1D [in, out]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from oarsmith.errors import ModelError
from oarsmith.models import names
from oarsmith.models.families.base import ConfigReader, Family, fused
from oarsmith.models.names import Duplicate, Ignored, NameMap
from oarsmith.models.spec import GQA, MLP, DecoderSpec, LayerNormSpec, LayerSpec


def build(config: Mapping[str, Any]) -> DecoderSpec:
    read = ConfigReader(config)
    hidden, heads, num_layers = read.integer("n_embd", 768), read.integer("n_head", 12), read.integer("n_layer", 12)
    positions = read.integer("n_positions", read.integer("n_ctx", 1024))
    if hidden % heads:
        raise ModelError(f"n_embd {hidden} is not a multiple of n_head {heads}", where="config.json")
    dim, inner = hidden // heads, read.integer("n_inner", 4 * hidden)
    norm = LayerNormSpec(size=hidden, eps=read.number("layer_norm_epsilon", 1e-5))
    scale = dim**-0.5 if read.flag("scale_attn_weights", True) else 1.0
    by_layer = read.flag("scale_attn_by_inverse_layer_idx", False)

    def layer(index: int) -> LayerSpec:
        attention = GQA(
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=dim,
            scale=scale / (index + 1) if by_layer else scale,
            qkv=fused(hidden, ("c_attn", 3 * hidden), bias=True),
            out=fused(hidden, ("c_proj", hidden), bias=True),
            rope=None,
        )
        ffn = MLP(
            up=fused(hidden, ("c_fc", inner), bias=True),
            down=fused(inner, ("c_proj", hidden), bias=True),
            activation=read.activation("activation_function", default="gelu_new"),
        )
        return LayerSpec(attention=attention, ffn=ffn, attention_norm=norm, ffn_norm=norm)

    return DecoderSpec(
        vocab_size=read.integer("vocab_size", 50257),
        hidden_size=hidden,
        layers=tuple(layer(index) for index in range(num_layers)),
        final_norm=norm,
        tied=read.flag("tie_word_embeddings", True),
        max_positions=positions,
        learned_positions=positions,
        init_std=read.number("initializer_range", 0.02),
    )


def name_map(spec: DecoderSpec) -> NameMap:
    found: list[names.Place | Ignored | Duplicate] = [
        names.Place("transformer.wte.weight", "embedding.weight", names.whole),
        names.Place("transformer.wpe.weight", "position_embedding.weight", names.whole),
    ]
    for index, layer in enumerate(spec.layers):
        file, here, ffn = f"transformer.h.{index}", f"layers.{index}", layer.ffn
        assert isinstance(ffn, MLP)
        found += names.norm(f"{file}.ln_1", f"{here}.attention_norm", layer.attention_norm)
        found += names.conv1d(f"{file}.attn", f"{here}.attention.qkv", layer.attention.qkv)
        found += names.conv1d(f"{file}.attn", f"{here}.attention.out", layer.attention.out)
        found += names.norm(f"{file}.ln_2", f"{here}.ffn_norm", layer.ffn_norm)
        found += names.conv1d(f"{file}.mlp", f"{here}.ffn.up", ffn.up)
        found += names.conv1d(f"{file}.mlp", f"{here}.ffn.down", ffn.down)
    found += names.norm("transformer.ln_f", "final_norm", spec.final_norm)
    head: names.Place | Duplicate = Duplicate("lm_head.weight", "embedding.weight")
    if not spec.tied:
        head = names.Place("lm_head.weight", "head.weight", names.whole)
    found += [head, Ignored(r"transformer\.h\.\d+\.attn\.(masked_)?bias", "the causal mask, a constant")]
    return NameMap(tuple(found), optional_prefix="transformer.")


FAMILY = Family(
    name="gpt2",
    description="GPT-2 and GPT-3 style models (learned positions, LayerNorm)",
    model_types=("gpt2",),
    architectures=("GPT2LMHeadModel", "GPT2Model"),
    build=build,
    names=name_map,
)
