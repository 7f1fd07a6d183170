"""Typed access to a GGUF file's metadata."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from oarsmith.checkpoint.gguf.reader import GgufFile
from oarsmith.errors import CheckpointError

# Metadata that changes the computation: value that means "off". A family that has a place for it says so.
_MUST_BE_OFF: Mapping[str, Any] = {
    "expert_count": 0,
    "expert_group_count": 1,
    "expert_shared_count": 0,
    "attention.scale": 0.0,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attention.q_lora_rank": 0,
    "attention.kv_lora_rank": 0,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
    "logit_scale": 0.0,
    "residual_scale": 0.0,
    "embedding_scale": 0.0,
    "attention.causal": True,
    "use_parallel_residual": False,
    "nextn_predict_layers": 0,
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
            if not value or any(item != value[0] for item in value):
                raise self.error(key, f"layers of different sizes ({value}) are not supported")
            return value[0]
        return value

    def has(self, tensor: str) -> bool:
        """Whether the file holds a tensor."""
        return tensor in self.file.tensors

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

    def typed(self, key: str, kind: type) -> Any:
        """A required value: a whole number that is not negative, a finite number, or true or false."""
        if kind is float:
            return self.real(key)
        value = self.optional(key)
        if value is None:
            value = self._required(f"{self.architecture}.{key}")
        if type(value) is not kind or (isinstance(value, int) and value < 0):
            raise self.error(key, f"{value!r} is not {'true or false' if kind is bool else 'a whole number'}")
        return value

    def require_off(self, known: Collection[str]) -> None:
        """Stop at metadata that changes the computation in a way this family's config cannot say."""
        for key, off in _MUST_BE_OFF.items():
            value = None if key in known else self.optional(key)
            if value is not None and value != off and value != 0:
                raise self.error(key, f"value {value!r} is not supported for {self.architecture}")

    def sizes(self, *, any_head: bool) -> dict[str, int]:
        """layers, hidden, ffn, heads, kv_heads, head, context and vocab (rows of the embedding).

        Args:
            any_head: the family reads the sizes of its heads itself; `head` is then hidden / heads.
        """
        heads, hidden = self.whole("attention.head_count"), self.whole("embedding_length")
        kv_heads = self.whole("attention.head_count_kv", heads)
        if heads % kv_heads:
            raise self.error("attention.head_count_kv", f"{heads} heads do not divide among {kv_heads} key-value heads")
        head = hidden // heads if any_head else self.whole("attention.key_length", max(1, hidden // heads))
        value_length = head if any_head else self.whole("attention.value_length", head)
        if value_length != head:
            raise self.error(
                "attention.value_length", f"{value_length} differs from the head size {head}: not supported"
            )
        embedding = self.file.tensors.get("token_embd.weight")
        if embedding is None:
            raise CheckpointError("the tensor token_embd.weight is missing", where=str(self.file.path))
        layers = self.whole("block_count")
        if layers > len(self.file.tensors):  # bounds what is done for each layer
            raise self.error("block_count", f"{layers:,} layers, but the file has {len(self.file.tensors):,} tensors")
        return {
            "layers": layers,
            "hidden": hidden,
            "ffn": self.whole("feed_forward_length"),
            "heads": heads,
            "kv_heads": kv_heads,
            "head": head,
            "context": self.whole("context_length"),
            "vocab": embedding.shape[0],
        }
