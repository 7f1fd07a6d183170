"""Where the loop gets its batches from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from oarsmith.data.batch import Batch


class BatchSource(Protocol):
    """Batches in an order that (seed, epoch) alone decide, and a place in it that a few numbers say.

    Iterating gives the batches from the present place to the end of its epoch; the place moves on before a batch is
    handed out. ``state`` has at least ``epoch`` and ``position``.
    """

    def batches_per_epoch(self, epoch: int) -> int: ...

    def __iter__(self) -> Iterator[Batch]: ...

    def state(self) -> dict[str, Any]: ...

    def load_state(self, state: dict[str, Any]) -> None: ...


BatchSet = Callable[[], Iterator[Batch]]
"""The same batches, in the same order, each time it is called: what is evaluated on."""
