"""The config of a model that is trained from scratch: sizes that follow from tokenizer and rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from oarsmith.errors import ModelError

_VOCABULARY = ("padded_vocab_size", "vocab_size")
_CONTEXT = ("max_position_embeddings", "n_positions", "max_sequence_length", "model_max_length", "seq_length")
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers")
"""What configs call the number of layers."""
LAYER_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""Lists with one entry a layer."""


def fresh_config(
    config: Mapping[str, Any], *, num_tokens: int, num_positions: int, num_layers: int | None = None
) -> dict[str, Any]:
    """A copy of a ``config.json`` with room for a tokenizer of ``num_tokens`` ids and rows of ``num_positions`` tokens.

    The vocabulary grows to a multiple of 128, which matrix products like; nothing shrinks. ``num_layers`` replaces the
    number of blocks.

    Raises:
        ModelError: more blocks than a config lists one by one.
    """
    result = dict(config)
    padded = -(-num_tokens // 128) * 128
    for key in _VOCABULARY:
        if isinstance(result.get(key), int) and result[key] < num_tokens:
            result[key] = padded
    for key in _CONTEXT:
        if isinstance(result.get(key), int):
            result[key] = max(result[key], num_positions)
    if num_layers is not None:
        for key in LAYER_COUNTS:
            if key in result:
                result[key] = num_layers
        for key in LAYER_LISTS:
            if isinstance(result.get(key), list):
                if len(result[key]) < num_layers:
                    raise ModelError(f"{key} names the kinds of {len(result[key])} blocks", where="num_hidden_layers")
                result[key] = result[key][:num_layers]
    return result
