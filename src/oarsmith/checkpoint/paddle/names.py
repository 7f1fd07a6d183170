"""PaddleNLP's names and layouts, family by family, as data.

PaddleNLP stores the weight of a linear map as [in, out] and names tensors after its own classes. A family here says
how a Hugging Face name becomes PaddleNLP's, which tensors PaddleNLP splits into several, and which it keeps as
[in, out] where Hugging Face does too. Both directions follow: the names of a model are known from its config, so the
map is built forwards and looked up backwards. Source: the name mappings in PaddleNLP's
paddlenlp/transformers/*/modeling.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from oarsmith.errors import CheckpointError

_EMBEDDING = re.compile(r".*(embed_tokens|embed_positions|word_embeddings|position_embeddings|wte|wpe)\.weight")
_HEAD = re.compile(r"(lm_head|.*output_layer)\.weight")
QKV = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True, kw_only=True)
class PaddleFamily:
    """How one family's tensors are called in PaddleNLP.

    Args:
        model_type: PaddleNLP's; mostly also the first part of its names.
        architecture: PaddleNLP's class.
        renames: (pattern, replacement) for Hugging Face names, the first that matches from the start counts.
        splits: last module of a Hugging Face name -> the modules it becomes, along the output axis.
        transposed: whether PaddleNLP's linear weights are the transposes of the Hugging Face ones.
        tied_head: PaddleNLP never stores a head of its own.
        groups: PaddleNLP module -> how many equal parts lie in a row of a fused map (``qkv``: query, key, value), for
            shards of tensor parallelism hold a piece of each part.
    """

    model_type: str
    architecture: str
    renames: tuple[tuple[str, str], ...]
    splits: Mapping[str, tuple[str, ...]]
    transposed: bool = True
    tied_head: bool = False
    groups: Mapping[str, int | str]


def _family(
    model_type: str,
    architecture: str,
    *renames: tuple[str, str],
    splits: Mapping[str, tuple[str, ...]] | None = None,
    transposed: bool = True,
    tied_head: bool = False,
    groups: Mapping[str, int | str] | None = None,
) -> PaddleFamily:
    return PaddleFamily(
        model_type=model_type,
        architecture=architecture,
        renames=renames or ((r"model\.", f"{model_type}."),),
        splits=splits or {},
        transposed=transposed,
        tied_head=tied_head,
        groups={"gate_up_fused_proj": 2, **(groups or {})},
    )


_UNCHANGED = (r"model\.", "model.")
_GPT_LAYER = r"transformer\.h\.(\d+)\."
_OPT_LAYER = r"model\.decoder\.layers\.(\d+)\."
# Hugging Face model_type (chatglm has two layouts under one name, see `paddle_family`) -> PaddleNLP's.
FAMILIES: Mapping[str, PaddleFamily] = {
    "llama": _family("llama", "LlamaForCausalLM"),
    "mistral": _family("mistral", "MistralForCausalLM"),
    "mixtral": _family("mixtral", "MixtralForCausalLM"),
    "qwen2": _family("qwen2", "Qwen2ForCausalLM"),
    "qwen2_moe": _family("qwen2_moe", "Qwen2MoeForCausalLM"),
    "qwen3": _family("qwen3", "Qwen3ForCausalLM", _UNCHANGED),  # the first to keep the names
    "qwen3_moe": _family("qwen3_moe", "Qwen3MoeForCausalLM", _UNCHANGED),
    "gemma": _family("gemma", "GemmaForCausalLM"),
    "yuan": _family("yuan", "YuanForCausalLM"),
    "deepseek_v2": _family("deepseek_v2", "DeepseekV2ForCausalLM"),
    "deepseek_v3": _family("deepseek_v3", "DeepseekV3ForCausalLM"),
    "qwen": _family("qwen", "QWenForCausalLM", (r"transformer\.", "qwen."), groups={"c_attn": 3}),
    "bloom": _family("bloom", "BloomForCausalLM", (r"transformer\.", "bloom."), tied_head=True),
    "chatglm": _family("chatglm", "ChatGLMForCausalLM", (r"transformer\.", "chatglm.transformer."), tied_head=True),
    "chatglm_v2": _family(
        "chatglm_v2",
        "ChatGLMv2ForCausalLM",
        (r"transformer\.", "chatglm_v2."),
        groups={"query_key_value": "qkv", "dense_h_to_4h": 2},
    ),
    "gpt2": _family(
        "gpt",
        "GPTForCausalLM",
        (r"transformer\.wte\.", "gpt.embeddings.word_embeddings."),
        (r"transformer\.wpe\.", "gpt.embeddings.position_embeddings."),
        (r"transformer\.ln_f\.", "gpt.decoder.norm."),
        (_GPT_LAYER + r"ln_1\.", r"gpt.decoder.layers.\1.norm1."),
        (_GPT_LAYER + r"ln_2\.", r"gpt.decoder.layers.\1.norm2."),
        (_GPT_LAYER + r"mlp\.c_fc\.", r"gpt.decoder.layers.\1.linear1."),
        (_GPT_LAYER + r"mlp\.c_proj\.", r"gpt.decoder.layers.\1.linear2."),
        (_GPT_LAYER + r"attn\.c_proj\.", r"gpt.decoder.layers.\1.self_attn.out_proj."),
        (_GPT_LAYER + r"attn\.", r"gpt.decoder.layers.\1.self_attn."),
        splits={"c_attn": QKV},
        transposed=False,
        tied_head=True,
    ),
    "opt": _family(
        "opt",
        "OPTForCausalLM",
        (r"model\.decoder\.embed_tokens\.", "opt.embeddings.word_embeddings."),
        (r"model\.decoder\.embed_positions\.", "opt.embeddings.position_embeddings."),
        (_OPT_LAYER + r"self_attn_layer_norm\.", r"opt.decoder.layers.\1.norm1."),
        (_OPT_LAYER + r"final_layer_norm\.", r"opt.decoder.layers.\1.norm2."),
        (_OPT_LAYER + r"fc1\.", r"opt.decoder.layers.\1.linear1."),
        (_OPT_LAYER + r"fc2\.", r"opt.decoder.layers.\1.linear2."),
        (r"model\.", "opt."),
        tied_head=True,
    ),
    # PaddleNLP runs Baichuan as a Llama whose config says `alibi`.
    "baichuan": _family("llama", "LlamaForCausalLM", splits={"W_pack": QKV}),
}


def paddle_family(config: Mapping[str, Any]) -> PaddleFamily:
    """The PaddleNLP family of a Hugging Face config.

    Raises:
        CheckpointError: PaddleNLP has no such model.
    """
    kind = str(config.get("model_type"))
    if kind == "chatglm" and "multi_query_group_num" in config:
        kind = "chatglm_v2"
    if kind not in FAMILIES:
        raise CheckpointError(
            f"PaddleNLP has no models of type {kind!r}, or none whose layout is known here",
            where="config.json",
            fix=f"known: {', '.join(FAMILIES)}",
        )
    return FAMILIES[kind]


@dataclass(frozen=True)
class Layout:
    """Where a Hugging Face tensor lies in PaddleNLP's files.

    Args:
        names: the tensors that hold it; several hold equal parts of it, side by side along the output axis (the last).
        transposed: whether they are [in, out] where the Hugging Face tensor is [out, in].
    """

    names: tuple[str, ...]
    transposed: bool

    def piece_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of each of the tensors, for a Hugging Face tensor of this shape."""
        turned = tuple(reversed(shape)) if self.transposed else shape
        return (*turned[:-1], turned[-1] // len(self.names)) if turned else turned

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """PaddleNLP's tensors for a Hugging Face one."""
        turned = tensor.t() if self.transposed else tensor
        return turned.chunk(len(self.names), dim=-1) if len(self.names) > 1 else (turned,)

    def join(self, pieces: list[Tensor]) -> Tensor:
        """The Hugging Face tensor of PaddleNLP's."""
        turned = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)
        return turned.t().contiguous() if self.transposed else turned


def layout(family: PaddleFamily, name: str, num_axes: int) -> Layout:
    """Where the tensor of this Hugging Face name and number of axes lies."""
    renamed = _rename(family, name)
    linear = num_axes == 2 and not _EMBEDDING.fullmatch(name)
    path, _, kind = renamed.rpartition(".")
    parent, _, module = path.rpartition(".")
    names = [".".join(filter(None, (parent, part, kind))) for part in family.splits.get(module, (module,))]
    return Layout(tuple(names), linear and (family.transposed or is_head(name)))


def _rename(family: PaddleFamily, name: str) -> str:
    for pattern, new in family.renames:
        if re.match(pattern, name):
            return re.sub(pattern, new, name, count=1)
    return name


def is_head(name: str) -> bool:
    """Whether a Hugging Face name is that of the output matrix."""
    return _HEAD.fullmatch(name) is not None


def group_sizes(family: PaddleFamily, name: str, widths: tuple[int, ...], config: Mapping[str, Any]) -> tuple[int, ...]:
    """Widths of the parts that lie side by side in the output axis (of this width) of a PaddleNLP tensor."""
    if not widths:
        return ()
    module = name.split(".")[-2] if "." in name else ""
    kind = family.groups.get(module, 1)
    if isinstance(kind, int):
        return (widths[-1] // kind,) * kind
    head_dim = int(config.get("kv_channels") or config["hidden_size"] // config["num_attention_heads"])
    query = head_dim * int(config["num_attention_heads"])
    return query, (widths[-1] - query) // 2, (widths[-1] - query) // 2
