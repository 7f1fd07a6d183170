"""PaddleNLP's files written independently of the product: plain loops over names, pickle and numpy.

The layouts are those of PaddleNLP's modeling files: weights [in, out], its own names, and for tensor parallelism the
splits its mappings prescribe.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

LAYER = "layers.{}."
LLAMA_LINEAR = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
COLUMN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")
ROW = ("o_proj", "down_proj", "embed_tokens")


def array(tensor: Tensor) -> np.ndarray:
    """bfloat16 has no numpy type: Paddle keeps its bits as uint16."""
    tensor = tensor.detach().contiguous()
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def llama_state(weights: Mapping[str, Tensor], prefix: str) -> dict[str, np.ndarray]:
    """A Llama-like model's Hugging Face tensors as PaddleNLP's."""
    state = {}
    for name, tensor in weights.items():
        new = f"{prefix}.{name[len('model.') :]}" if name.startswith("model.") else name
        linear = name == "lm_head.weight" or (tensor.dim() == 2 and "embed" not in name)
        state[new] = array(tensor.t() if linear else tensor)
    return state


def gpt_state(weights: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """GPT-2: Conv1D weights are [in, out] already; c_attn becomes three."""
    words = {"ln_1": "norm1", "ln_2": "norm2", "mlp.c_fc": "linear1", "mlp.c_proj": "linear2"}
    state = {}
    for name, tensor in weights.items():
        name = name.removeprefix("transformer.")
        kind = name.rpartition(".")[2]
        if name.startswith(("wte", "wpe")):
            which = "word" if name.startswith("wte") else "position"
            state[f"gpt.embeddings.{which}_embeddings.weight"] = array(tensor)
        elif name.startswith("ln_f"):
            state[f"gpt.decoder.norm.{kind}"] = array(tensor)
        else:
            _, layer, rest = name.split(".", 2)
            module, home = rest.rpartition(".")[0], f"gpt.decoder.layers.{layer}."
            if module == "attn.c_attn":
                for part, piece in zip("qkv", np.split(array(tensor), 3, axis=-1), strict=True):
                    state[f"{home}self_attn.{part}_proj.{kind}"] = piece
            elif module == "attn.c_proj":
                state[f"{home}self_attn.out_proj.{kind}"] = array(tensor)
            else:
                state[f"{home}{words[module]}.{kind}"] = array(tensor)
    return state


def fuse(state: Mapping[str, np.ndarray], heads: int, kv_heads: int) -> dict[str, np.ndarray]:
    """As `fuse_attention_qkv` and `fuse_attention_ffn` store it: heads group by group, gate beside up."""
    fused = dict(state)
    for name in [name for name in state if "q_proj" in name]:
        q, k, v = (fused.pop(name.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj"))
        queries, keys, values = np.split(q, heads, -1), np.split(k, kv_heads, -1), np.split(v, kv_heads, -1)
        per_group = heads // kv_heads
        parts = []
        for group in range(kv_heads):
            parts += [*queries[group * per_group : (group + 1) * per_group], keys[group], values[group]]
        fused[name.replace("q_proj", "qkv_proj")] = np.concatenate(parts, -1)
    for name in [name for name in state if "gate_proj" in name]:
        gate, up = fused.pop(name), fused.pop(name.replace("gate_proj", "up_proj"))
        fused[name.replace("gate_proj", "gate_up_fused_proj")] = np.concatenate([gate, up], -1)
    return fused


def shard(state: Mapping[str, np.ndarray], degree: int, kv_heads: int) -> list[dict[str, np.ndarray]]:
    """The ranks of tensor parallelism: column splits on the last axis, row splits on the first, the rest copied."""
    ranks: list[dict[str, Any]] = [{} for _ in range(degree)]
    for name, value in state.items():
        module = name.split(".")[-2]
        if module in ("k_proj", "v_proj") and kv_heads % degree:
            pieces = [value] * degree
        elif module in COLUMN or module == "qkv_proj":
            pieces = np.split(value, degree, -1)
        elif module in ("gate_up_fused_proj", "dense_h_to_4h"):  # [A1 B1] [A2 B2]
            halves = [np.split(half, degree, -1) for half in np.split(value, 2, -1)]
            pieces = [np.concatenate([half[rank] for half in halves], -1) for rank in range(degree)]
        elif module in ROW and value.ndim == 2:
            pieces = np.split(value, degree, 0)
        else:
            pieces = [value] * degree
        for rank, piece in zip(ranks, pieces, strict=True):
            rank[name] = np.ascontiguousarray(piece)
    return ranks


def save(state: Mapping[str, np.ndarray], path: Path, *, named: bool = False) -> None:
    """As ``paddle.save`` does: plain arrays with the name table, or ``tuple((name, array))`` for each."""
    value: dict[str, Any] = dict(state)
    if named:
        value = {name: _Named((f"linear_{i}.w_0", data)) for i, (name, data) in enumerate(state.items())}
    else:
        value["StructuredToParameterName@@"] = {name: f"linear_{i}.w_0" for i, name in enumerate(state)}
    with path.open("wb") as file:
        pickle.dump(value, file, protocol=4)


class _Named:
    def __init__(self, value: tuple[str, np.ndarray]) -> None:
        self.value = value

    def __reduce__(self) -> object:
        return tuple, (self.value,)
