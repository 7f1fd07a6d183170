"""The decoder's own modules as what computes the engine's steps.

Shapes: T tokens of a step, N rows that need logits, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from oarsmith.engine.backend import Part
from oarsmith.engine.tensor_logits import TensorLogits
from oarsmith.models.decoder import Decoder
from oarsmith.models.layout import KVCache


class DecoderBackend:
    """The decoder's own modules."""

    def __init__(self, model: Decoder, cache: KVCache) -> None:
        self._model = model
        self._cache = cache
        self._hidden_TD = torch.empty(0)

    @torch.inference_mode()
    def compute(self, parts: Sequence[Part]) -> None:
        cache = self._cache
        for part in parts:
            cache.pages[part.row], cache.used[part.row] = list(part.pages), part.start
        counts, rows = [len(part.tokens) for part in parts], [part.row for part in parts]
        layout = cache.extend(counts, rows, [part.prompt_size for part in parts])
        asked = tuple(part.prompt_size if part.asked is None else part.asked for part in parts)
        layout = replace(layout, asked=asked)
        ids = torch.tensor([token for part in parts for token in part.tokens], device=self._model.device)
        self._hidden_TD = self._model.hidden(ids, layout, cache)

    @torch.inference_mode()
    def logits(self, places: Sequence[int]) -> TensorLogits:
        hidden_TD = self._hidden_TD
        if len(places) < len(hidden_TD):
            hidden_TD = hidden_TD[torch.tensor(places, device=hidden_TD.device)]
        return TensorLogits(self._model.logits(hidden_TD))

    @torch.inference_mode()
    def copy_page(self, source: int, target: int) -> None:
        self._cache.copy_page(source, target)

    @torch.inference_mode()
    def copy_sequence(self, source: int, target: int) -> None:
        self._cache.copy_sequence(source, target)
