"""What a step needs to know of the other processes of its run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from oarsmith.data.batch import Batch
from oarsmith.kernels import sum_of_squares
from oarsmith.models.decoder import Decoder


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass of a process.

    Attributes:
        index: of the batch in the step, over all processes: random numbers are keyed by it.
        counts: False where the process only keeps others company: its gradients are zero, its sums are left out.
    """

    index: int
    batch: Batch
    counts: bool


def squares_of(grads: Iterable[Tensor]) -> Tensor:
    """The sum of squares of each tensor, one after another: one transfer from a GPU, not one a tensor."""
    return torch.stack([sum_of_squares(grad) for grad in grads])


class Ranks(Protocol):
    """The processes of a run. Every process knows all batches of a step; each computes its share of them."""

    @property
    def is_main(self) -> bool:
        """Whether this process speaks and writes for all."""

    @property
    def alone(self) -> bool:
        """Whether there are no others."""

    def dealt(self, batches: Iterable[Batch]) -> Iterator[Pass]:
        """This process's passes, as many as every other has."""

    def begin_pass(self, *, last: bool) -> None:
        """A pass with gradients follows, the last one of a step or not."""

    def end_passes(self) -> None:
        """Passes without a backward pass are over."""

    def local(self, tensor: Tensor) -> Tensor:
        """The part of a parameter or gradient that lies here, in the same memory."""

    def reduced(self, grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gradients of the whole step, of what lies here."""

    def squares(self, grads: Mapping[str, Tensor]) -> Tensor:
        """One fp64 number or more on the CPU whose sum is that of the squares of all gradients, each counted once."""

    def total(self, sums: Sequence[float]) -> list[float]:
        """Sums over the processes' passes."""

    def any(self, here: bool) -> bool:
        """Whether it holds in some process; all ask at the same time."""

    def barrier(self) -> None:
        """Wait for everybody."""

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors that lie like their parameters (``{parameter}/{what}``), together.

        The main process alone gets them.
        """

    def own(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What of such whole tensors lies here."""

    def whole_model(self, model: Decoder) -> Decoder | None:
        """A model with all weights that train, for files; the main process alone gets it."""

    def load_model(self, model: Decoder, load: Callable[[Decoder, Path], None], path: Path) -> None:
        """Take the weights that train from files that ``load`` reads into a whole model."""


class Alone:
    """One process."""

    is_main = True
    alone = True

    def dealt(self, batches: Iterable[Batch]) -> Iterator[Pass]:
        """All of them."""
        return (Pass(at, batch, counts=True) for at, batch in enumerate(batches))

    def begin_pass(self, *, last: bool) -> None:
        """Nothing to do."""

    def end_passes(self) -> None:
        """Nothing to do."""

    def local(self, tensor: Tensor) -> Tensor:
        """All of it."""
        return tensor

    def reduced(self, grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As they are."""
        return dict(grads)

    def squares(self, grads: Mapping[str, Tensor]) -> Tensor:
        """Of each tensor."""
        return squares_of(grads.values()).cpu()

    def total(self, sums: Sequence[float]) -> list[float]:
        """As they are."""
        return list(sums)

    def any(self, here: bool) -> bool:
        """Whether it holds here."""
        return here

    def barrier(self) -> None:
        """There is nobody to wait for."""

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """They are."""
        return dict(tensors)

    def own(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All of them."""
        return dict(tensors)

    def whole_model(self, model: Decoder) -> Decoder | None:
        """It is."""
        return model

    def load_model(self, model: Decoder, load: Callable[[Decoder, Path], None], path: Path) -> None:
        """Read them."""
        load(model, path)


ALONE: Ranks = Alone()
