"""How a layer's activations, keys and values are rounded while its model runs, and the scales that this needs.

Shapes: T tokens, I features, G kv heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from oarsmith.errors import ConfigError
from oarsmith.models.rounding import Activations, CacheScheme
from oarsmith.quantize.activations import Method, Observer, round_activations
from oarsmith.quantize.pieces import Piece
from oarsmith.quantize.scheme import Scheme
from oarsmith.quantize.walk import Keys, Tap

_OUT = "attention.out"


class Running:
    """Of one layer. A map's inputs are looked at until it has been rounded, and rounded from then on.

    Args:
        pieces: of the layer's maps, by path.
        method: how static scales of inputs are found, and ``cache_method`` those of keys and values.

    Raises:
        ConfigError: pieces of a map, which has one input, ask for different activations.
    """

    def __init__(
        self,
        pieces: Mapping[str, Sequence[Piece]],
        scheme: Scheme,
        method: Method = "abs_max",
        cache_method: Method = "abs_max",
    ) -> None:
        self._how = {path: how for path, own in pieces.items() if (how := _activations(own, scheme)) is not None}
        self._observers = {path: Observer(method) for path, how in self._how.items() if how.static}
        self._cache = scheme.cache
        self._observed: tuple[Observer, Observer] | None = None
        if scheme.cache is not None:
            heads = scheme.cache.per_head
            self._observed = Observer(cache_method, heads=heads), Observer(cache_method, heads=heads)
        self.taps: dict[str, Tap] = {}
        self.cache_scales: tuple[Tensor, Tensor] | None = None

    def watches(self, paths: Iterable[str]) -> bool:
        """Whether inputs of these maps must be seen before they are rounded."""
        return any(path in self._observers or (path == _OUT and self._cache is not None) for path in paths)

    def watching(self, path: str, also: Tap) -> Tap:
        """Looks at the inputs of a map, for itself and for another, which gets them rounded where no scale must be
        found first: weights are then chosen for what they will meet."""
        observer, how = self._observers.get(path), self._how.get(path)

        def told(x_TI: Tensor, counts: Sequence[int]) -> Tensor | None:
            if observer is not None:
                observer.add(x_TI)
            elif how is not None:
                x_TI = round_activations(x_TI, how)
            return also(x_TI, counts)

        return told

    def begin(self, path: str) -> float | None:
        """From now on a map's inputs are rounded, and with those of attention's last map the keys and values.

        Returns:
            Their static scale, where there is one.
        """
        if path == _OUT and self._cache is not None and self._observed is not None:
            keys, values = (observer.scale(self._cache.code) for observer in self._observed)
            self.cache_scales = keys, values
        how = self._how.get(path)
        if how is None:
            return None
        scale = self._observers[path].scale(how.code) if how.static else None
        self.taps[path] = lambda x_TI, counts: round_activations(x_TI, how, scale)
        return None if scale is None else float(scale)

    @property
    def keys(self) -> Keys | None:
        """Looks at keys and values, or rounds them."""
        if self._cache is None or self._observed is None:
            return None
        if self.cache_scales is not None:
            return rounded_keys(self._cache, self.cache_scales)
        own_keys, own_values = self._observed

        def look(layer: int, k_TGK: Tensor, v_TGK: Tensor) -> tuple[Tensor, Tensor]:
            own_keys.add(k_TGK)
            own_values.add(v_TGK)
            return k_TGK, v_TGK

        return look


def rounded_keys(cache: CacheScheme, scales: tuple[Tensor, Tensor]) -> Keys:
    """Keys and values as a cache with these scales, of heads [G] or of all, gives them back."""
    how = Activations(code=cache.code, static=True)

    def rounded(x_TGK: Tensor, scale: Tensor) -> Tensor:
        return round_activations(x_TGK, how, scale[:, None] if scale.dim() else scale)

    return lambda layer, k_TGK, v_TGK: (rounded(k_TGK, scales[0]), rounded(v_TGK, scales[1]))


def _activations(pieces: Sequence[Piece], scheme: Scheme) -> Activations | None:
    found = {scheme.of(piece.stem).activations for piece in pieces}
    if len(found) > 1:
        stems = ", ".join(piece.stem for piece in pieces[:3])
        raise ConfigError(
            f"{stems} read the same input, which cannot be rounded in two ways",
            where="overrides",
            fix="give them schemes with the same activations",
        )
    return found.pop()
