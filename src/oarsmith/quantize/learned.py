"""A layer whose weights' roundings are learned together (AutoRound), in place of map after map.

Shapes: O out, I in features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.func import functional_call

from oarsmith.models.block import Block
from oarsmith.quantize.autoround import AutoRound, autoround
from oarsmith.quantize.gptq import Rounded, weight_error
from oarsmith.quantize.grid import Grid
from oarsmith.quantize.inputs import linear
from oarsmith.quantize.pieces import Piece, runs_of
from oarsmith.quantize.scheme import Scheme
from oarsmith.quantize.walk import Batch, Stream

Run = tuple[str, int | None, int, int]
"""Rows of a map that are rounded together: its path, the expert, first row, end."""


def learn_layer(
    block: Block,
    pieces: Mapping[str, list[Piece]],
    scheme: Scheme,
    settings: AutoRound,
    batches: Sequence[Batch],
    own: Stream,
    targets: Stream,
) -> dict[Run, Rounded]:
    """Every run of rows that gets a grid, learned from what the layer reads and what it made in the model in floats.

    Args:
        own: what goes into the layer as the model is quantized.
        targets: what comes out of it in the model in floats.
    """
    grids: dict[str, Grid] = {}
    weights: dict[str, Tensor] = {}
    runs: dict[str, Run] = {}
    for path, those in pieces.items():
        weight = linear(block, path).weight
        for kind, run in runs_of(those, scheme):
            if kind.weights is None:
                continue
            matrix = weight if run[0].expert is None else weight[run[0].expert]
            start, stop = run[0].start, len(matrix) if run[-1].stop is None else run[-1].stop
            name = run[0].stem if run[0].expert is None else f"{run[0].stem}[{run[0].expert}]"
            runs[name] = path, run[0].expert, start, stop
            grids[name], weights[name] = kind.weights, matrix[start:stop]

    def outputs(rounded: Mapping[str, Tensor], number: int) -> Tensor:
        batch = batches[number]
        parameters = {f"{path}.weight": _assembled(block, path, runs, rounded) for path in pieces}
        found: Tensor = functional_call(
            block, parameters, (own.states[number], batch.layout, batch.tables, None), strict=False
        )
        return found

    with torch.enable_grad():
        learned = autoround(outputs, weights, targets.states, grids, settings)
    return {
        run: Rounded(
            quantized=learned.quantized[name],
            error=weight_error(weights[name], learned.quantized[name].dense()),
            damping=0.0,
        )
        for name, run in runs.items()
    }


def _assembled(block: Block, path: str, runs: Mapping[str, Run], rounded: Mapping[str, Tensor]) -> Tensor:
    """A map's weight with its runs in place, and what is not rounded as it is; with gradients."""
    weight = linear(block, path).weight
    if linear(block, path).spec.experts is None:
        return _rows(weight, [(run, rounded[name]) for name, run in runs.items() if run[0] == path])
    return torch.stack(
        [
            _rows(own, [(run, rounded[name]) for name, run in runs.items() if run[:2] == (path, expert)])
            for expert, own in enumerate(weight)
        ]
    )


def _rows(weight_OI: Tensor, parts: list[tuple[Run, Tensor]]) -> Tensor:
    pieces, at = [], 0
    for (_, _, start, stop), rows in sorted(parts, key=lambda part: part[0][2]):
        pieces += [weight_OI[at:start], rows]
        at = stop
    return torch.cat([*pieces, weight_OI[at:]])
