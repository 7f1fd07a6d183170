"""Rows of a batch beside one another: the layout and the cache that compiled graphs compute with.

The engine's token stream has documents of any length; here every row brings as many tokens as the others and owns a
row of the cache. All sizes may be symbols: nothing follows from a number that only Python has.

Shapes: B rows, T tokens of a row in this call, S places of a row in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from oarsmith.models.layout import Layout, RowPlaces


class RowCache:
    """Keys and values of every layer, in tensors that the caller owns: [B, S, ...] each, written in place.

    Args:
        slots: for each layer, its tensors.
        start_B: where each row's next token goes.
        num_tokens: T.
    """

    def __init__(self, slots: Sequence[Sequence[Tensor]], start_B: Tensor, num_tokens: int) -> None:
        self._slots = slots
        self._row_B1 = torch.arange(start_B.shape[0], device=start_B.device)[:, None]
        self._positions_BT = start_B[:, None] + torch.arange(num_tokens, device=start_B.device)

    def layout(self) -> Layout:
        """That of the call: the rows one after another in the stream."""
        positions_T = self._positions_BT.flatten()
        places = RowPlaces(self._positions_BT, self._slots[0][0].shape[1])
        return Layout((), (), positions_T, positions_T + 1, positions_T + 1, rows=places)

    def write(self, layer: int, *new: Tensor) -> list[Tensor]:
        """Store this call's tensors [B * T, ...] of a layer; all that it holds."""
        stores = list(self._slots[layer])
        for store, value in zip(stores, new, strict=True):
            rows = value.to(store.dtype).unflatten(0, self._positions_BT.shape)
            store.index_put_((self._row_B1, self._positions_BT), rows)
        return stores

    def state(self, layer: int) -> Tensor:
        raise AssertionError(f"layer {layer}: families that keep a state are not compiled")
