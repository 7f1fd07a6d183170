"""Keys of ``adapter_factors.py`` beside values with which they mean nothing."""

from __future__ import annotations

from typing import Any

from .adapter_factors import WITHOUT_ALPHA, FactorKeys
from .adapters import AdapterKeys
from .impossible import Impossible

_METHODS = ("vera", "lokr", "ia3", "fourierft", "oft", "boft", "bottleneck")
# Shared keys -> the methods here that do without.
_UNUSED = {
    "lora_rank": frozenset({"ia3", "fourierft", "oft", "boft"}),
    "lora_alpha": WITHOUT_ALPHA,
    "lora_dropout": frozenset({"ia3", "oft", "boft", "bottleneck"}),
    "rslora": WITHOUT_ALPHA | {"lokr", "loha"},
}


def _given(c: AdapterKeys, name: str) -> bool:
    return bool(dict(c)[name] != AdapterKeys.model_fields[name].default)


def _own(method: str) -> Impossible[Any]:
    """The keys of one method, which begin with its name."""
    keys = [key for key in FactorKeys.model_fields if key.startswith(f"{method}_")]
    listed = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])} or {keys[-1]}"
    return Impossible(
        AdapterKeys,
        lambda c: c.adapter_type != method and any(_given(c, key) for key in keys),
        f"{listed} is given, but has no effect without adapter_type {method}",
        f"add adapter_type {method}, or remove it",
    )


def _unused(key: str, methods: frozenset[str]) -> Impossible[Any]:
    """A key of other methods."""
    return Impossible(
        AdapterKeys,
        lambda c: c.adapter_type in methods and _given(c, key),
        f"{key} is given, but has no effect with adapter_type {{adapter_type}}",
        "remove it",
    )


def _two(first: str, second: str, fix: str) -> Impossible[Any]:
    """Two keys for one thing."""
    return Impossible(
        AdapterKeys,
        lambda c: _given(c, first) and _given(c, second),
        f"{first} and {second} are both given, and say the same thing in two ways",
        fix,
    )


FACTORS: tuple[Impossible[Any], ...] = (
    *map(_own, _METHODS),
    *(_unused(key, methods) for key, methods in _UNUSED.items()),
    _two("oft_blocks", "oft_block_size", "keep one of them"),
    _two("boft_blocks", "boft_block_size", "keep one of them"),
    _two("oft_exact", "oft_neumann_terms", "keep one of them"),
    Impossible(
        AdapterKeys,
        lambda c: _given(c, "oft_eps") and not c.oft_constrained,
        "oft_eps is given, but has no effect without oft_constrained",
        "add oft_constrained true, or remove it",
    ),
)
