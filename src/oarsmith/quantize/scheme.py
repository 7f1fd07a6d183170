"""What is quantized, and how: a scheme for a model, and what each of its maps gets."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from oarsmith.models.rounding import Activations, CacheScheme
from oarsmith.quantize.grid import Grid


@dataclass(frozen=True, kw_only=True)
class MapScheme:
    """What one linear map gets; None: it stays in floats."""

    weights: Grid | None
    activations: Activations | None = None


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """A whole model's.

    Attributes:
        default: what maps get that nothing else is said of.
        overrides: patterns of the maps' names in the files (``model.layers.0.mlp.*``; the first that fits counts), and
            what they get. The head and the embedding are no maps of this kind.
        cache: of keys and values; None: as they are.
    """

    name: str
    default: MapScheme
    overrides: Mapping[str, MapScheme]
    cache: CacheScheme | None = None

    def of(self, stem: str) -> MapScheme:
        """What the map whose weight is ``{stem}.weight`` in the files gets."""
        for pattern, found in self.overrides.items():
            if fnmatch.fnmatchcase(stem, pattern):
                return found
        return self.default

    def all_maps(self) -> Iterator[MapScheme]:
        """Everything that maps may get."""
        yield self.default
        yield from self.overrides.values()
