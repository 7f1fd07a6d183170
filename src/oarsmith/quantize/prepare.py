"""A layer made easier to quantize, and still the same function: channels shifted and scaled.

Shapes: T tokens, I in features, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from oarsmith.models.block import Block
from oarsmith.models.spec import LayerSpec
from oarsmith.quantize.awq import AWQ, awq_factors
from oarsmith.quantize.gptq import Hessian
from oarsmith.quantize.grid import Grid
from oarsmith.quantize.inputs import (
    Input,
    NormSource,
    divide,
    inputs_of,
    linear,
    shared_factor,
    shift,
    takes_factor,
    takes_shift,
)
from oarsmith.quantize.pieces import Piece
from oarsmith.quantize.scheme import Scheme
from oarsmith.quantize.smooth import Extremes, Piecewise, piecewise_factors, smooth_factors
from oarsmith.quantize.walk import Batch, Stream, Tap, run_block

# Tokens on which the piecewise search computes outputs.
_SAMPLE = 256


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What is done to a layer's inputs before its weights are rounded.

    Attributes:
        factors: how they are found.
        everywhere: behind attention and activations too, else only behind norms.
        alpha: SmoothQuant's.
    """

    factors: Literal["none", "smoothquant", "piecewise", "awq"] = "none"
    everywhere: bool = False
    shift: bool = False
    alpha: float = 0.5
    piecewise: Piecewise = field(default_factory=Piecewise)
    awq: AWQ = field(default_factory=AWQ)

    @property
    def nothing(self) -> bool:
        """Whether layers stay as they are."""
        return self.factors == "none" and not self.shift


class _Seen:
    """What went into a map, or into one expert's."""

    def __init__(self, size: int, preparation: Preparation, num_tokens: int) -> None:
        self.extremes = Extremes()
        self.num_tokens = 0
        self._sum_I = torch.zeros(size)
        self._gram = Hessian(size) if preparation.factors == "awq" else None
        self._sample: list[Tensor] | None = [] if preparation.factors == "piecewise" else None
        self._stride = max(1, num_tokens // _SAMPLE)

    def add(self, x_TI: Tensor) -> None:
        """A batch of inputs."""
        self.extremes.add(x_TI)
        self.num_tokens += len(x_TI)
        self._sum_I += x_TI.abs().sum(0)
        if self._gram is not None:
            self._gram.add(x_TI)
        if self._sample is not None:
            self._sample.append(x_TI[:: self._stride].clone())

    def factors(self, weights: Sequence[Tensor], grid: Grid, one: Input, preparation: Preparation) -> Tensor:
        """Factors [I] for the weights [O, I] that read it; 1 where nothing was seen."""
        if self.num_tokens == 0:
            return torch.ones_like(self._sum_I)
        tie = partial(shared_factor, one)
        match preparation.factors:
            case "smoothquant":
                return tie(smooth_factors(self.extremes.most_I, weights, preparation.alpha))
            case "piecewise":
                assert self._sample is not None
                sample = torch.cat(self._sample)
                return piecewise_factors(sample, self.extremes.most_I, weights, preparation.piecewise, tie)
            case _:
                assert self._gram is not None
                mean_I, gram_II = self._sum_I / self.num_tokens, self._gram.matrix_II
                return awq_factors(weights, mean_I, gram_II, grid, preparation.awq, tie).factor_I


@torch.no_grad()
def prepare_layer(
    spec: LayerSpec,
    block: Block,
    pieces: Mapping[str, list[Piece]],
    scheme: Scheme,
    preparation: Preparation,
    batches: Sequence[Batch],
    stream: Stream,
) -> None:
    """Shift and scale what a layer's quantized maps read. In place; its outputs stay."""
    grids = {path: grid for path, own in pieces.items() if (grid := _grid(own, scheme)) is not None}
    chosen = [one for one in inputs_of(spec) if set(one.maps) & grids.keys()]
    if not preparation.everywhere:
        chosen = [one for one in chosen if isinstance(one.source, NormSource)]
    if preparation.shift:
        shifted = [one for one in chosen if takes_shift(block, one)]
        for one, seen in _watch(block, shifted, replace(preparation, factors="none"), batches, stream):
            shift(block, one, shared_factor(one, seen[0].extremes.shift_I))
    if preparation.factors == "none":
        return
    scaled = [one for one in chosen if takes_factor(block, one)]
    for one, seen in _watch(block, scaled, preparation, batches, stream):
        weights = [linear(block, path).weight for path in one.maps]
        grid = next(grids[path] for path in one.maps if path in grids)
        if _by_expert(block, one):
            (stacked,) = weights
            each = zip(seen, stacked.unbind(), strict=True)
            factor = torch.stack([own.factors([weight], grid, one, preparation) for own, weight in each])
        else:
            rows = [weight.flatten(0, -2) for weight in weights]
            factor = seen[0].factors(rows, grid, one, preparation)
        divide(block, one, factor)


def _grid(pieces: Sequence[Piece], scheme: Scheme) -> Grid | None:
    """Of the first piece that gets one."""
    return next((grid for piece in pieces if (grid := scheme.of(piece.stem).weights) is not None), None)


def _by_expert(block: Block, one: Input) -> bool:
    """Whether each expert has an input of its own."""
    return linear(block, one.maps[0]).spec.experts is not None and not isinstance(one.source, NormSource)


def _watch(
    block: Block, inputs: Sequence[Input], preparation: Preparation, batches: Sequence[Batch], stream: Stream
) -> list[tuple[Input, list[_Seen]]]:
    """What goes into each input: once, or for each expert."""
    num_tokens = sum(len(batch.ids_T) for batch in batches)
    found: list[tuple[Input, list[_Seen]]] = []
    taps: dict[str, Tap] = {}
    for one in inputs:
        module = linear(block, one.maps[0])
        count = module.spec.experts or 1 if _by_expert(block, one) else 1
        seen = [_Seen(module.spec.in_features, preparation, num_tokens) for _ in range(count)]
        found.append((one, seen))

        def told(x_TI: Tensor, counts: Sequence[int], seen: list[_Seen] = seen) -> None:
            for own, rows in zip(seen, x_TI.split(list(counts)) if len(seen) > 1 else [x_TI], strict=True):
                own.add(rows)

        taps[one.maps[0]] = told
    if taps:
        run_block(block, batches, stream, taps, enough=True)
    return found
