"""DeepSeek-V3, V3.1, R1, and what copies their layout (Moonlight).

DeepSeek-AI 2024 (arXiv 2412.19437): the blocks of DeepSeek-V2, experts chosen by sigmoid scores plus a stored
correction that balances their load. The layers past the last in released files predict the token after next; they are
a training aid and a draft model, not part of this decoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from oarsmith.models.families.base import ConfigReader, Family
from oarsmith.models.families.deepseek_v2 import expert_groups, latent_attention, layers, only
from oarsmith.models.families.llama import rms_norm
from oarsmith.models.families.naming import Names
from oarsmith.models.families.parts import decoder
from oarsmith.models.spec import DecoderSpec
from oarsmith.models.spec_parts import RouterSpec

_DEFAULTS: dict[str, Any] = {
    "first_k_dense_replace": 3,
    "initializer_range": 0.006,  # section 4.2
    "kv_lora_rank": 512,
    "max_position_embeddings": 4096,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 8,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "routed_scaling_factor": 2.5,
    "topk_group": 4,
    "v_head_dim": 128,
}


def build(config: Mapping[str, Any]) -> DecoderSpec:
    read = ConfigReader({**_DEFAULTS, **config})
    only(read, "scoring_func", "sigmoid")
    only(read, "topk_method", "noaux_tc")
    top_k = read.integer("num_experts_per_tok")
    router = RouterSpec(
        num_experts=read.integer("n_routed_experts"),
        top_k=top_k,
        score="sigmoid",
        normalize=read.flag("norm_topk_prob", True) and top_k > 1,
        scale=read.number("routed_scaling_factor"),
        groups=expert_groups(read, best=2),
        correction=True,
    )
    mixer = latent_attention(read, "adjacent" if read.flag("rope_interleave", True) else "half")
    return decoder(read, layers(read, mixer, router), rms_norm(read))


FAMILY = Family(
    name="deepseek_v3",
    model_types=("deepseek_v3",),
    architectures=("DeepseekV3ForCausalLM",),
    build=build,
    tensor_names=Names(
        q_norm="q_a_layernorm",
        shared="shared_experts",
        later_layers="they predict the token after next, which this decoder does not",
    ),
)
