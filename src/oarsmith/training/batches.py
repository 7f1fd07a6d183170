"""Where the loop gets its batches from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from torch import Tensor

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


class KeepingBatches(ABC):
    """A source whose next batches do not follow from its place alone: it has made something that a checkpoint must
    hold."""

    @abstractmethod
    def batches_per_epoch(self, epoch: int) -> int: ...

    @abstractmethod
    def __iter__(self) -> Iterator[Batch]: ...

    @abstractmethod
    def state(self) -> dict[str, Any]: ...

    @abstractmethod
    def load_state(self, state: dict[str, Any]) -> None: ...

    @abstractmethod
    def state_tensors(self) -> dict[str, Tensor]:
        """What was made and is not used up; asked for where a checkpoint is written, after ``state``."""

    @abstractmethod
    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on with it; after ``load_state``."""


BatchSet = Callable[[], Iterator[Batch]]
"""The same batches, in the same order, each time it is called: what is evaluated on."""
