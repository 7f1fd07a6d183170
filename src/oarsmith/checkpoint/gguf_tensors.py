"""Tensor names and layouts of the GGUF architectures as tables, and the plan that makes Hugging Face tensors of them.

llama.cpp changes four things when it writes a file, each undone here (source: llama.cpp's convert_hf_to_gguf.py): q and
k rows are permuted for its interleaved rotary embedding (llama, mistral), 1 is added to gemma's norm weights, GPT-2's
Conv1D weights are transposed, and tied output heads are left out or stored as a copy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from oarsmith.checkpoint.gguf_reader import GgufFile, GgufTensor
from oarsmith.errors import CheckpointError

Change = Literal["keep", "unpermute_q", "unpermute_k", "minus_one", "transpose"]


@dataclass(frozen=True)
class Place:
    """Where a GGUF tensor goes. `shape` names its dimensions in the file (row-major): keys of `ModelSizes.dims`."""

    target: str
    shape: str
    change: Change = "keep"
    required: bool = True


@dataclass(frozen=True)
class Layout:
    """All tensors of one architecture: outside the layers, and inside layer i with targets below `layer_prefix`."""

    top: Mapping[str, Place]
    layer: Mapping[str, Place]
    layer_prefix: str


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the output: its source, its name and what happens on the way."""

    source: GgufTensor
    target: str
    change: Change


def _linear(source: str, target: str, shape: str, change: Change = "keep") -> dict[str, Place]:
    out = shape.split()[0]
    return {
        f"{source}.weight": Place(f"{target}.weight", shape, change),
        f"{source}.bias": Place(f"{target}.bias", out, change, required=False),
    }


def _llama_like(*, permuted: bool = False, norm: Change = "keep", qk_norm: bool = False) -> Layout:
    layer = {
        "attn_norm.weight": Place("input_layernorm.weight", "hidden", norm),
        "ffn_norm.weight": Place("post_attention_layernorm.weight", "hidden", norm),
        **_linear("attn_q", "self_attn.q_proj", "q hidden", "unpermute_q" if permuted else "keep"),
        **_linear("attn_k", "self_attn.k_proj", "kv hidden", "unpermute_k" if permuted else "keep"),
        **_linear("attn_v", "self_attn.v_proj", "kv hidden"),
        **_linear("attn_output", "self_attn.o_proj", "hidden q"),
        **_linear("ffn_gate", "mlp.gate_proj", "ffn hidden"),
        **_linear("ffn_up", "mlp.up_proj", "ffn hidden"),
        **_linear("ffn_down", "mlp.down_proj", "hidden ffn"),
    }
    if qk_norm:
        layer["attn_q_norm.weight"] = Place("self_attn.q_norm.weight", "head")
        layer["attn_k_norm.weight"] = Place("self_attn.k_norm.weight", "head")
    top = {
        "token_embd.weight": Place("model.embed_tokens.weight", "vocab hidden"),
        "output_norm.weight": Place("model.norm.weight", "hidden", norm),
        "output.weight": Place("lm_head.weight", "vocab hidden", required=False),
    }
    return Layout(top=top, layer=layer, layer_prefix="model.layers.")


def _gpt2() -> Layout:
    def both(source: str, target: str, shape: str, change: Change = "keep") -> dict[str, Place]:
        weight, bias = Place(f"{target}.weight", shape, change), Place(f"{target}.bias", shape.split()[0])
        return {f"{source}.weight": weight, f"{source}.bias": bias}

    return Layout(
        top={
            "token_embd.weight": Place("transformer.wte.weight", "vocab hidden"),
            "position_embd.weight": Place("transformer.wpe.weight", "context hidden"),
            **both("output_norm", "transformer.ln_f", "hidden"),
            "output.weight": Place("lm_head.weight", "vocab hidden", required=False),
        },
        layer={
            **both("attn_norm", "ln_1", "hidden"),
            **both("attn_qkv", "attn.c_attn", "qkv hidden", "transpose"),
            **both("attn_output", "attn.c_proj", "hidden hidden", "transpose"),
            **both("ffn_norm", "ln_2", "hidden"),
            **both("ffn_up", "mlp.c_fc", "ffn hidden", "transpose"),
            **both("ffn_down", "mlp.c_proj", "hidden ffn", "transpose"),
        },
        layer_prefix="transformer.h.",
    )


LAYOUTS: Mapping[str, Layout] = {
    "llama": _llama_like(permuted=True),
    "qwen2": _llama_like(),
    "qwen3": _llama_like(qk_norm=True),
    "gemma": _llama_like(norm="minus_one"),
    "gpt2": _gpt2(),
}
ROPE_FACTORS = "rope_freqs.weight"  # read by gguf_config: it is the llama3 scaling in another form
_LAYER_NAME = re.compile(r"blk\.(\d+)\.(.+)")


def has_tied_head(file: GgufFile) -> bool:
    """Whether the output head is the embedding: left out of the file, or stored as the same bytes."""
    head, embedding = file.tensors.get("output.weight"), file.tensors.get("token_embd.weight")
    if head is None:
        return True
    if embedding is None or (head.type, head.shape) != (embedding.type, embedding.shape):
        return False
    return bool(np.array_equal(file.raw(head), file.raw(embedding)))


def plan_tensors(
    file: GgufFile, layout: Layout, dims: Mapping[str, int], num_layers: int, *, tied: bool
) -> list[PlannedTensor]:
    """Give every tensor of the file its place, in file order.

    Args:
        dims: size of each dimension name used in `Place.shape`.
        tied: leave the output head out.

    Raises:
        CheckpointError: a tensor without a place, a missing or differently shaped one, a bias only some layers have.
    """
    planned = []
    seen: dict[str, Place] = {}
    for tensor in file.tensors.values():
        if tensor.name == ROPE_FACTORS or (tied and tensor.name == "output.weight"):
            continue
        place = _find_place(tensor.name, layout, num_layers)
        if place is None:
            raise CheckpointError(
                f"this architecture has no place for the tensor (model of {num_layers} layers)",
                where=f"{file.path}: {tensor.name}",
                fix="the file uses a variant this version does not know; please report it",
            )
        expected = tuple(dims[name] for name in place.shape.split())
        if tensor.shape != expected:
            raise CheckpointError(
                f"shape {tensor.shape}, but the metadata says ({place.shape}) = {expected}",
                where=f"{file.path}: {tensor.name}",
                fix="the file's metadata and tensors disagree; convert the model again",
            )
        seen[tensor.name] = place
        planned.append(PlannedTensor(tensor, place.target, place.change))
    _check_complete(file, layout, set(seen), num_layers, tied=tied)
    return planned


def _find_place(name: str, layout: Layout, num_layers: int) -> Place | None:
    match = _LAYER_NAME.fullmatch(name)
    if match is None:
        return layout.top.get(name)
    index, inner = int(match[1]), match[2]
    place = layout.layer.get(inner)
    if place is None or index >= num_layers:
        return None
    return Place(f"{layout.layer_prefix}{index}.{place.target}", place.shape, place.change)


def _check_complete(file: GgufFile, layout: Layout, seen: set[str], num_layers: int, *, tied: bool) -> None:
    expected = {name for name, place in layout.top.items() if place.required}
    if not tied:
        expected.add("output.weight")
    inner = [name for name, place in layout.layer.items() if place.required or f"blk.0.{name}" in seen]
    expected |= {f"blk.{index}.{name}" for index in range(num_layers) for name in inner}
    if missing := sorted(expected - seen):
        raise CheckpointError(
            f"{len(missing)} tensors are missing, first {', '.join(missing[:3])}",
            where=str(file.path),
            fix="the file is incomplete; convert or download the model again",
        )
    if extra := sorted(seen - expected):
        raise CheckpointError(f"only some layers have {', '.join(extra[:3])}", where=str(file.path))


def read_planned(
    file: GgufFile, planned: PlannedTensor, dtype: torch.dtype, num_heads: int, num_kv_heads: int
) -> torch.Tensor:
    """Read one tensor in its Hugging Face layout, in `dtype`."""
    if planned.change == "minus_one":  # in float32: 1 + w has lost w's small bits if rounded to bfloat16 first
        return file.read(planned.source, torch.float32).sub_(1).to(dtype)
    tensor = file.read(planned.source, dtype)
    if planned.change == "transpose":
        return tensor.T if tensor.dim() == 2 else tensor
    if planned.change == "unpermute_q":
        return _unpermute(tensor, num_heads)
    if planned.change == "unpermute_k":
        return _unpermute(tensor, num_kv_heads)
    return tensor


def _unpermute(tensor: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows (pair, half) of each head -> (half, pair): interleaved rotary order back to Hugging Face's split halves."""
    half = tensor.shape[0] // num_heads // 2
    return tensor.reshape(num_heads, half, 2, -1).transpose(1, 2).reshape(tensor.shape)
