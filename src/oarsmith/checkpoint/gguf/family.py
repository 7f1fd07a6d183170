"""A model family on both sides: keys of a GGUF file's metadata and keys of config.json, as data.

One `Family` serves reading and writing. What both sides say in the same way is a `Field`; what llama.cpp has built in,
and config.json says, is a `Fixed`; the rest is in the family's hooks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from oarsmith.checkpoint.gguf.links import Link
from oarsmith.checkpoint.gguf.metadata import Metadata
from oarsmith.checkpoint.gguf.rope import PLAIN_ROPE, RopeStyle, rope_to_config
from oarsmith.checkpoint.gguf.rope_write import rope_to_metadata
from oarsmith.errors import CheckpointError

RMS = "attention.layer_norm_rms_epsilon"
LAYER = "attention.layer_norm_epsilon"
GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu")  # llama.cpp computes the tanh form for all of them
_SPELLING: Mapping[str, str | None] = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "ffn": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head": "head_dim",
    "context": "max_position_embeddings",
    "vocab": "vocab_size",
}
_ALIASES: Mapping[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "hidden": ("hidden_size", "n_embd", "n_embed"),
    "ffn": ("intermediate_size", "n_inner", "ffn_hidden_size"),
    "heads": ("num_attention_heads", "n_head"),
    "kv_heads": ("num_key_value_heads",),
    "head": ("head_dim",),
    "context": ("max_position_embeddings", "n_positions", "seq_length", "model_max_length", "max_sequence_length"),
    "vocab": ("vocab_size", "padded_vocab_size"),
}


class Config:
    """config.json with typed access; errors name the file and the key."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def error(self, key: str, what: str, fix: str | None = None) -> CheckpointError:
        return CheckpointError(what, where=f"{self.where}: {key}", fix=fix)

    def get(self, key: str, default: Any = None) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def whole(self, *keys: str, default: int | None = None) -> int:
        """A whole number, not negative, under the first of `keys` that is set."""
        key = next((key for key in keys if self.values.get(key) is not None), keys[0])
        value = self.get(key, default)
        if type(value) is not int or value < 0:
            raise self.error(key, f"{value!r} is not a whole number")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if type(value) not in (int, float) or not math.isfinite(value):
            raise self.error(key, f"{value!r} is not a finite number")
        return float(value)


@dataclass(frozen=True)
class Field:
    """A value both sides have.

    Attributes:
        meta: GGUF key without the architecture's name.
        config: key of config.json.
        kind: int, float or bool.
        default: what an absent key means, on both sides; None: it must be there.
        optional: may be absent or null on both sides.
        other: a second spelling that config.json may have.
    """

    meta: str
    config: str
    kind: type
    default: Any = None
    optional: bool = False
    other: str | None = None

    def key(self, config: Config) -> str:
        """The spelling that `config` has."""
        return self.other if self.other and config.get(self.config) is None else self.config


@dataclass(frozen=True)
class Fixed:
    """A config.json value that llama.cpp has built in for the architecture.

    Attributes:
        value: written on reading a GGUF file.
        accepts: further values that mean the same.
        default: what config.json means without the key; `value` if None.
    """

    config: str
    value: Any
    accepts: tuple[Any, ...] = ()
    default: Any = None


Dims = dict[str, int]
Notes = list[str]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One ``model_type`` and the GGUF architecture it is written as.

    Attributes:
        links: its tensors, given config and sizes.
        spelling: config.json's names for sizes, where they differ; None: config.json does not have it.
        epsilon: (GGUF key, config key) of the norms; epsilon_default where config.json leaves it out.
        rope: how the rotary embedding is described; None for another kind of position.
        tied: what a missing ``tie_word_embeddings`` means.
        stores_tied_head: llama.cpp wants ``output.weight`` even where it is the embedding.
        matches: whether a GGUF file of the architecture is of this family; the first that matches is taken.
        sizes: adds to or corrects the sizes of dimensions, given config.json.
        read: adds to config.json what the tables cannot say. write: the same for metadata, and refuses what cannot be
            said. knows: keys the hooks handle.
    """

    arch: str
    model_type: str
    class_name: str
    links: Callable[[Config, Dims], list[Link]]
    spelling: Mapping[str, str | None] = field(default_factory=dict)
    epsilon: tuple[str, str] = (RMS, "rms_norm_eps")
    epsilon_default: float | None = None
    rope: RopeStyle | None = PLAIN_ROPE
    fields: tuple[Field, ...] = ()
    fixed: tuple[Fixed, ...] = ()
    tied: bool = False
    stores_tied_head: bool = False
    matches: Callable[[Metadata], bool] = lambda metadata: True
    sizes: Callable[[Config, Dims], None] | None = None
    read: Callable[[Metadata, dict[str, Any]], None] | None = None
    write: Callable[[Config, Dims, dict[str, Any], Notes], None] | None = None
    knows: tuple[str, ...] = ()

    def spell(self, dim: str) -> str | None:
        return self.spelling[dim] if dim in self.spelling else _SPELLING[dim]

    def dims(self, config: Config) -> Dims:
        """Sizes of all named dimensions of the model that `config` describes."""

        def size(dim: str, default: int | None = None) -> int:
            spelled = self.spell(dim)
            value = config.whole(*([spelled] if spelled else []), *_ALIASES[dim], default=default)
            if value == 0:
                raise config.error(spelled or _ALIASES[dim][0], "must not be 0")
            return value

        hidden, heads = size("hidden"), size("heads")
        dims = {
            "layers": size("layers"),
            "hidden": hidden,
            "heads": heads,
            "kv_heads": size("kv_heads", heads),
            "head": size("head", hidden // heads),
            "ffn": size("ffn", 4 * hidden),
            "context": size("context", 2048),
            "vocab": size("vocab"),
        }
        if self.sizes is not None:
            self.sizes(config, dims)
        if dims["heads"] % dims["kv_heads"]:
            raise config.error(
                "num_key_value_heads", f"{heads} heads do not divide among {dims['kv_heads']} key-value heads"
            )
        dims.setdefault("q", dims["heads"] * dims["head"])
        dims.setdefault("kv", dims["kv_heads"] * dims["head"])
        dims.setdefault("qkv", dims["q"] + 2 * dims["kv"])
        return dims


def read_config(family: Family, metadata: Metadata) -> dict[str, Any]:
    """config.json's values from GGUF metadata, but for those that come from the tokenizer.

    Raises:
        CheckpointError: a missing or wrong key, or one whose meaning the family's config cannot express.
    """
    metadata.require_off({*family.knows, *(item.meta for item in family.fields)})
    config: dict[str, Any] = {"architectures": [family.class_name], "model_type": family.model_type}
    sizes = metadata.sizes(any_head="attention.key_length" in family.knows)
    for dim, value in sizes.items():
        key = family.spell(dim)
        if key is not None:
            config[key] = value
    config[family.epsilon[1]] = metadata.real(family.epsilon[0], family.epsilon_default)
    for item in family.fields:
        value = metadata.optional(item.meta)
        if value is None and (item.optional or item.default is not None):
            value = item.default
        else:
            value = metadata.typed(item.meta, item.kind)
        if value is not None:
            config[item.config] = value
    config |= {item.config: item.value for item in family.fixed}
    if family.rope is not None:
        config |= rope_to_config(metadata, family.rope, head=sizes["head"])
    if family.read is not None:
        family.read(metadata, config)
    return config


def write_metadata(
    family: Family, config: Config, dims: Dims, notes: Notes
) -> tuple[dict[str, Any], dict[str, Sequence[float]]]:
    """Metadata of the architecture (keys without its name), and the rotary factor tensors by name.

    Raises:
        CheckpointError: config.json says something llama.cpp cannot compute.
    """
    for fixed in family.fixed:
        value = config.get(fixed.config, fixed.value if fixed.default is None else fixed.default)
        if value != fixed.value and value not in fixed.accepts:
            raise config.error(
                fixed.config,
                f"llama.cpp computes {family.arch} with {fixed.value!r}; config.json says {value!r}",
                fix="this model cannot be written as GGUF",
            )
    metadata: dict[str, Any] = {
        "block_count": dims["layers"],
        "context_length": dims["context"],
        "embedding_length": dims["hidden"],
        "feed_forward_length": dims["ffn"],
        "attention.head_count": dims["heads"],
        "attention.head_count_kv": dims["kv_heads"],
        "attention.key_length": dims["head"],
        "attention.value_length": dims["head"],
        "vocab_size": dims["vocab"],
        family.epsilon[0]: config.real(family.epsilon[1], family.epsilon_default),
    }
    for item in family.fields:
        key = item.key(config)
        value = config.get(key, item.default)
        if value is None and item.optional:
            continue
        if item.kind is bool and type(value) is not bool:
            raise config.error(key, f"{value!r} is not true or false")
        if item.kind is int:
            value = config.whole(key, default=item.default)
        if item.kind is float:
            value = config.real(key, item.default)
        metadata[item.meta] = value
    factors: dict[str, Sequence[float]] = {}
    if family.rope is not None:
        metadata |= rope_to_metadata(config.values, family.rope, dims, factors, notes, where=config.where)
    if family.write is not None:
        family.write(config, dims, metadata, notes)
    return metadata, factors
