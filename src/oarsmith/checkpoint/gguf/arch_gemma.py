"""GGUF tables of Gemma 1, 2 and 3. llama.cpp stores 1 + w of every norm. Source: llama.cpp's conversion/gemma.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from oarsmith.checkpoint.gguf.arch_llama import attention, gated_mlp, qk_norms, top
from oarsmith.checkpoint.gguf.family import GELU, Config, Dims, Family, Field, Fixed, Notes
from oarsmith.checkpoint.gguf.links import PLUS_ONE, Link, in_layers, norm
from oarsmith.checkpoint.gguf.metadata import Metadata
from oarsmith.checkpoint.gguf.rope import RopeStyle

_ACTIVATIONS = (
    Fixed("hidden_activation", "gelu_pytorch_tanh", accepts=GELU),
    Fixed("hidden_act", "gelu_pytorch_tanh", accepts=GELU),
)
_WINDOW = Field("attention.sliding_window", "sliding_window", int, 4096)


def _links(*, sandwich: bool, qk: bool) -> Callable[[Config, Dims], list[Link]]:
    def links(config: Config, dims: Dims) -> list[Link]:
        before_mlp = "pre_feedforward_layernorm" if sandwich else "post_attention_layernorm"
        layer = [
            *norm("attn_norm", "input_layernorm", change=PLUS_ONE),
            *norm("ffn_norm", before_mlp, change=PLUS_ONE),
            *attention(dims, bias=False),
            *gated_mlp(),
        ]
        if sandwich:
            layer += norm("post_attention_norm", "post_attention_layernorm", change=PLUS_ONE)
            layer += norm("post_ffw_norm", "post_feedforward_layernorm", change=PLUS_ONE)
        if qk:
            layer += qk_norms(change=PLUS_ONE)
        return [*top(change=PLUS_ONE), *in_layers("model.layers.", layer, range(dims["layers"]))]

    return links


def _layer_types(num_layers: int, period: int) -> list[str]:
    return ["sliding_attention" if (index + 1) % period else "full_attention" for index in range(num_layers)]


def _scalar(dims: Dims, layers_27b: int) -> int:
    """What llama.cpp scales queries by: 1 / sqrt of this. It tells the 27B models by their number of layers."""
    return dims["hidden"] // dims["heads"] if dims["layers"] == layers_27b else dims["head"]


def _hooks(
    period: int, layers_27b: int
) -> tuple[Callable[[Metadata, dict[str, Any]], None], Callable[[Config, Dims, dict[str, Any], Notes], None]]:
    def read(metadata: Metadata, config: dict[str, Any]) -> None:
        dims = {
            "hidden": config["hidden_size"],
            "heads": config["num_attention_heads"],
            "head": config["head_dim"],
            "layers": config["num_hidden_layers"],
        }
        config["query_pre_attn_scalar"] = _scalar(dims, layers_27b)
        config["layer_types"] = _layer_types(dims["layers"], period)

    def write(config: Config, dims: Dims, metadata: dict[str, Any], notes: Notes) -> None:
        expected = _scalar(dims, layers_27b)
        if config.get("query_pre_attn_scalar", 256) != expected:
            raise config.error(
                "query_pre_attn_scalar",
                f"llama.cpp takes {expected} for a model of this size; config.json says "
                f"{config.get('query_pre_attn_scalar', 256)}",
            )
        types = _layer_types(dims["layers"], period)
        if config.get("layer_types", types) != types or config.get("sliding_window_pattern", period) != period:
            raise config.error("layer_types", f"llama.cpp makes every {period}th layer a full one, always")

    return read, write


_read2, _write2 = _hooks(period=2, layers_27b=46)
_read3, _write3 = _hooks(period=6, layers_27b=62)

FAMILIES = (
    Family(
        arch="gemma",
        model_type="gemma",
        class_name="GemmaForCausalLM",
        links=_links(sandwich=False, qk=False),
        epsilon_default=1e-6,
        fixed=_ACTIVATIONS,
        tied=True,
    ),
    Family(
        arch="gemma2",
        model_type="gemma2",
        class_name="Gemma2ForCausalLM",
        links=_links(sandwich=True, qk=False),
        epsilon_default=1e-6,
        fields=(
            _WINDOW,
            Field("attn_logit_softcapping", "attn_logit_softcapping", float, 50.0),
            Field("final_logit_softcapping", "final_logit_softcapping", float, 30.0),
        ),
        fixed=_ACTIVATIONS,
        tied=True,
        read=_read2,
        write=_write2,
    ),
    Family(
        arch="gemma3",
        model_type="gemma3_text",
        class_name="Gemma3ForCausalLM",
        links=_links(sandwich=True, qk=True),
        epsilon_default=1e-6,
        rope=RopeStyle(default_theta=1e6, local="rope_local_base_freq"),
        fields=(_WINDOW, Field("final_logit_softcapping", "final_logit_softcapping", float, optional=True)),
        fixed=(*_ACTIVATIONS, Fixed("use_bidirectional_attention", False)),
        tied=True,
        read=_read3,
        write=_write3,
    ),
)
