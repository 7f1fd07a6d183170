"""Typed access to a GGUF file's metadata, and the sizes every architecture has."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from oarsmith.checkpoint.gguf_reader import GgufFile
from oarsmith.errors import CheckpointError

# Metadata that changes the computation and has no place in the configs written here: value that means "off".
_MUST_BE_OFF: Mapping[str, Any] = {
    "expert_count": 0,
    "attention.scale": 0.0,
    "attention.clamp_kqv": 0.0,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
    "logit_scale": 0.0,
    "residual_scale": 0.0,
    "embedding_scale": 0.0,
    "attention.causal": True,
    "use_parallel_residual": False,
}


@dataclass(frozen=True)
class ModelSizes:
    """The numbers every architecture has; `vocab` is the row count of the embedding."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head: int
    context: int
    vocab: int

    def dims(self) -> dict[str, int]:
        """Sizes of the dimension names in `gguf_tensors`."""
        return {
            "hidden": self.hidden,
            "ffn": self.ffn,
            "head": self.head,
            "q": self.heads * self.head,
            "kv": self.kv_heads * self.head,
            "qkv": (self.heads + 2 * self.kv_heads) * self.head,
            "context": self.context,
            "vocab": self.vocab,
        }


class Metadata:
    """Typed access to the keys of one architecture, with errors that name file and key."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.architecture = str(self._required("general.architecture"))

    def _required(self, key: str) -> Any:
        if key not in self.file.metadata:
            raise CheckpointError(f"the metadata key {key!r} is missing", where=str(self.file.path))
        return self.file.metadata[key]

    def error(self, key: str, what: str, fix: str | None = None) -> CheckpointError:
        return CheckpointError(what, where=f"{self.file.path}: {self.architecture}.{key}", fix=fix)

    def optional(self, key: str) -> Any:
        """Value of `<architecture>.<key>` or None; a per-layer list must be uniform and counts as its one value."""
        value = self.file.metadata.get(f"{self.architecture}.{key}")
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise self.error(key, f"layers of different sizes ({value}) are not supported")
            return value[0]
        return value

    def whole(self, key: str, default: int | None = None) -> int:
        """A positive whole number; `default` where the key is absent."""
        value = self.optional(key)
        if value is None:
            value = default if default is not None else self._required(f"{self.architecture}.{key}")
        if type(value) is not int or value <= 0:
            raise self.error(key, f"{value!r} is not a positive whole number")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A positive finite number; `default` where the key is absent."""
        value = self.optional(key)
        if value is None:
            value = default if default is not None else self._required(f"{self.architecture}.{key}")
        if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
            raise self.error(key, f"{value!r} is not a positive number")
        return float(value)


def read_sizes(metadata: Metadata) -> ModelSizes:
    """Sizes of the model, checked for what the architectures here cannot express."""
    for key, off in _MUST_BE_OFF.items():
        value = metadata.optional(key)
        if value is not None and value != off:
            raise metadata.error(key, f"value {value!r} is not supported for {metadata.architecture}")
    heads, hidden = metadata.whole("attention.head_count"), metadata.whole("embedding_length")
    kv_heads = metadata.whole("attention.head_count_kv", heads)
    if heads % kv_heads:
        raise metadata.error("attention.head_count_kv", f"{heads} heads do not divide among {kv_heads} key-value heads")
    head = metadata.whole("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if metadata.whole(key, head) != head:
            raise metadata.error(key, f"{metadata.optional(key)} differs from the head size {head}: not supported")
    embedding = metadata.file.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError("the tensor token_embd.weight is missing", where=str(metadata.file.path))
    return ModelSizes(
        layers=metadata.whole("block_count"),
        hidden=hidden,
        ffn=metadata.whole("feed_forward_length"),
        heads=heads,
        kv_heads=kv_heads,
        head=head,
        context=metadata.whole("context_length"),
        vocab=embedding.shape[0],
    )
