"""The decoder's steps where requests have adapters of their own."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch

from oarsmith.adapters.bank import AdapterBank, Rows
from oarsmith.engine.backend import Part
from oarsmith.engine.decoder_backend import DecoderBackend
from oarsmith.models.layout import KVCache


class AdaptedBackend(DecoderBackend):
    """The decoder with the adapters of a bank; those of a step with the same adapter lie beside one another."""

    def __init__(self, bank: AdapterBank, cache: KVCache) -> None:
        super().__init__(bank.decoder, cache)
        self._bank = bank

    @torch.inference_mode()
    def compute(self, parts: Sequence[Part]) -> None:
        self._model = self._bank.decoder
        groups = [(name, list(group)) for name, group in groupby(parts, key=lambda part: part.adapter)]
        if not self._bank.apart:
            self._compute(groups)
            return
        hidden = []
        for group in groups:
            self._compute([group])
            hidden.append(self._hidden_TD)
        self._hidden_TD = torch.cat(hidden)

    def _compute(self, groups: Sequence[tuple[str | None, list[Part]]]) -> None:
        """One pass of the model, with each group under its adapter."""
        rows: list[Rows] = []
        start = 0
        for name, group in groups:
            stop = start + sum(len(part.tokens) for part in group)
            if name is not None:
                # Alone in its pass it has all rows, also those that are no tokens.
                rows.append((name, start, stop if len(groups) > 1 else None))
            start = stop
        with self._bank.rows(rows):
            super().compute([part for _, group in groups for part in group])
