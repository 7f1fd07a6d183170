"""The families: each a short file that turns a ``config.json`` into a spec and names its tensors."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from oarsmith.errors import ModelError
from oarsmith.models.families import gemma, gpt2, llama, mistral, qwen2, qwen3
from oarsmith.models.families.base import Family
from oarsmith.models.spec import DecoderSpec

__all__ = ["Family", "build_spec", "find", "known"]

_FAMILIES: tuple[Family, ...] = (
    llama.FAMILY,
    mistral.FAMILY,
    qwen2.FAMILY,
    qwen3.FAMILY,
    gemma.FAMILY,
    gpt2.FAMILY,
)


def known() -> tuple[Family, ...]:
    """All families this version knows."""
    return _FAMILIES


def find(config: Mapping[str, Any]) -> Family:
    """The family of a ``config.json``, by ``model_type``, else by ``architectures``.

    Raises:
        ModelError: nothing matches; names the known ones. ``auto_map`` is never followed: no code comes from a model.
    """
    model_type = config.get("model_type")
    architectures = config.get("architectures") or []
    for family in _FAMILIES:
        if model_type in family.model_types and family.matches(config):
            return family
    for family in _FAMILIES:
        if model_type is None and set(architectures) & set(family.architectures) and family.matches(config):
            return family
    names = [name for family in _FAMILIES for name in family.model_types]
    near = difflib.get_close_matches(str(model_type), names, n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    raise ModelError(
        f"unknown architecture: model_type {model_type!r}, architectures {architectures!r}",
        where="config.json",
        fix=f"{hint}known model types: {', '.join(names)} (see `oarsmith models`)",
    )


def build_spec(config: Mapping[str, Any]) -> tuple[Family, DecoderSpec]:
    """The family and the decoder spec of a config."""
    family = find(config)
    return family, family.build(config)
