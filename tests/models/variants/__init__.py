"""Tiny configurations of every family, one file a group of families; the parts of them that repeat are here.

Contexts of 16 are exceeded by the tests' 40 tokens.
"""

from __future__ import annotations

SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GQA = {**SIZES, "num_key_value_heads": 2}
GPT2 = {"vocab_size": 101, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "bos_token_id": 1}


def rope(kind: str, **values: object) -> dict[str, object]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 5000.0, **values}}
