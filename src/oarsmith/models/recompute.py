"""What the backward pass computes again instead of keeping (Chen et al. 2016; Korthikanti et al. 2022, section 5)."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from oarsmith.errors import ModelError

Granularity = Literal["full", "full_attn", "core_attn"]


@dataclass(frozen=True)
class Recompute:
    """The numbers stay the same: what runs twice draws the same random numbers both times.

    Args:
        granularity: ``full``: whole blocks, of which the input alone is kept. ``full_attn``: the attention part of a
            block with its norms and projections. ``core_attn``: rotation, scores, softmax and their product with the
            values; q, k and v are kept as they come from the projections.
        skip_layers: blocks, counted from 0, that keep everything.
    """

    granularity: Granularity = "full"
    skip_layers: frozenset[int] = frozenset()

    def require(self, num_layers: int) -> None:
        """Refuse layers that a model of ``num_layers`` does not have.

        Raises:
            ModelError: names them.
        """
        strangers = sorted(layer for layer in self.skip_layers if not 0 <= layer < num_layers)
        if strangers:
            raise ModelError(
                f"layers {strangers} do not exist: the model has {num_layers}",
                where="no_recompute_layers",
                fix=f"count from 0 to {num_layers - 1}",
            )

    def of_layer(self, layer: int) -> Granularity | None:
        """What a block computes again."""
        return None if layer in self.skip_layers else self.granularity


def run(function: Callable[..., Tensor], *inputs: object, again: bool) -> Tensor:
    """``function(*inputs)``; with ``again`` only the inputs are kept, and it runs a second time in backward."""
    if not again:
        return function(*inputs)
    call = _Call(function, inputs)
    with saved_tensors_hooks(call.keep, call.find):
        return function(*inputs)


class _Place:
    """Stands for a tensor that backward will ask for."""

    __slots__ = ("__weakref__", "value")

    def __init__(self) -> None:
        self.value: Tensor | None = None


class _Complete(Exception):  # noqa: N818 - no error
    """The second run has made the last tensor that backward asks for: what follows need not run."""


class _Call:
    """One call, of which backward gets the tensors by running it again when it asks for the first.

    The work of ``torch.utils.checkpoint``, whose first call imports PyTorch's compiler for seconds.
    """

    def __init__(self, function: Callable[..., Tensor], inputs: tuple[object, ...]) -> None:
        self._function, self._inputs = function, inputs
        # Weak, so that what backward no longer needs is not kept when it is made again.
        self._places: list[weakref.ref[_Place]] = []
        self._random = torch.get_rng_state()
        devices = {x.device for x in inputs if isinstance(x, Tensor) and x.is_cuda}
        self._random_of = {device: torch.cuda.get_rng_state(device) for device in devices}

    def keep(self, _: Tensor) -> _Place:
        """What is kept in place of a tensor."""
        place = _Place()
        self._places.append(weakref.ref(place))
        return place

    def find(self, place: _Place) -> Tensor:
        """The tensor of a place, once."""
        if place.value is None:
            self._run_again()
        value, place.value = place.value, None
        assert value is not None, "the second run kept fewer tensors for backward than the first"
        return value

    def _run_again(self) -> None:
        places = iter(self._places)
        left = len(self._places)

        def fill(x: Tensor) -> None:
            nonlocal left
            if (place := next(places)()) is not None:
                place.value = x.detach()
            left -= 1
            if not left:
                raise _Complete

        with (
            torch.random.fork_rng(self._random_of),
            torch.enable_grad(),
            saved_tensors_hooks(fill, _unasked),
            suppress(_Complete),
        ):
            torch.set_rng_state(self._random)
            for device, state in self._random_of.items():
                torch.cuda.set_rng_state(state, device)
            self._function(*self._inputs)


def _unasked(_: object) -> Tensor:
    raise AssertionError("the graph of the second run is not for backward")
