"""What computes the engine's steps: the decoder over its paged cache, or the native step in its place.

Shapes: T tokens of a step, N rows that need logits, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from oarsmith.models.decoder import Decoder
from oarsmith.models.layout import KVCache


@dataclass(frozen=True)
class Part:
    """Tokens that a step brings of one sequence.

    Attributes:
        start: the place of the first of them in the sequence.
        row: the sequence's row in the cache; ``pages``: its pages, in the order of its tokens.
        prompt_size: tokens of its prompt.
    """

    tokens: Sequence[int]
    start: int
    row: int
    pages: Sequence[int]
    prompt_size: int


class Backend(Protocol):
    """Computes steps and keeps keys and values."""

    def compute(self, parts: Sequence[Part]) -> None:
        """Bring the parts into the cache; their hidden states are kept until the next call."""

    def logits(self, places: Sequence[int]) -> Tensor:
        """Logits [N, V] after the tokens at these places of the last step, counted over all its parts."""

    def copy_page(self, source: int, target: int) -> None:
        """Make a page hold what another holds."""

    def copy_sequence(self, source: int, target: int) -> None:
        """Let a row of the cache go on from where another is; pages are the caller's affair."""


class DecoderBackend:
    """The decoder's own modules."""

    def __init__(self, model: Decoder, cache: KVCache) -> None:
        self._model = model
        self._cache = cache
        self._hidden_TD = torch.empty(0)

    def compute(self, parts: Sequence[Part]) -> None:
        cache = self._cache
        for part in parts:
            cache.pages[part.row], cache.used[part.row] = list(part.pages), part.start
        counts, rows = [len(part.tokens) for part in parts], [part.row for part in parts]
        layout = cache.extend(counts, rows, [part.prompt_size for part in parts])
        ids = torch.tensor([token for part in parts for token in part.tokens], device=self._model.device)
        self._hidden_TD = self._model.hidden(ids, layout, cache)

    def logits(self, places: Sequence[int]) -> Tensor:
        hidden_TD = self._hidden_TD
        if len(places) < len(hidden_TD):
            hidden_TD = hidden_TD[torch.tensor(places, device=hidden_TD.device)]
        return self._model.logits(hidden_TD)

    def copy_page(self, source: int, target: int) -> None:
        self._cache.copy_page(source, target)

    def copy_sequence(self, source: int, target: int) -> None:
        self._cache.copy_sequence(source, target)
