"""What a projection is for, by where it lies in the decoder: methods have places they were made for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from oarsmith.errors import ConfigError
from oarsmith.models.names import Place

Role = Callable[[Place], bool]

# Segments of fused maps that are neither keys nor values; a map with one segment holds all of them.
_QUERIES = frozenset({"q_proj", "query", "q"})


def ends_attention(place: Place) -> bool:
    """Whether it makes the output of the attention."""
    return place.parameter.endswith(".attention.out.weight")


def ends_feed_forward(place: Place) -> bool:
    """Whether it makes the output of the feed-forward part, or of an expert."""
    return re.search(r"\.ffn\.(experts\.|shared\.)?down\.weight$", place.parameter) is not None


def makes_keys_or_values(place: Place) -> bool:
    """Whether keys or values are what it makes, or are among it."""
    found = re.search(r"\.attention\.(\w+)\.weight$", place.parameter)
    return found is not None and found[1] in ("qkv", "qk", "kv", "k", "v", "kv_up") and place.segment not in _QUERIES


def by_role(places: Mapping[str, Place], roles: Iterable[Role]) -> list[str]:
    """The modules with one of these roles.

    Raises:
        ConfigError: there is none.
    """
    wanted = tuple(roles)
    found = [module for module, place in places.items() if any(role(place) for role in wanted)]
    if not found:
        raise ConfigError(
            "this model has no projection where the method sits by itself",
            where="lora_target_modules",
            fix="name the projections",
        )
    return found
