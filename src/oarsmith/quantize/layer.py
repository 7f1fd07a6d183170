"""One layer quantized, map after map in the order in which they run.

Shapes: T tokens, I in features, G kv heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from oarsmith.models.block import Block
from oarsmith.models.spec import LayerSpec
from oarsmith.quantize.gptq import Hessian
from oarsmith.quantize.grid import Quantized
from oarsmith.quantize.inputs import Input, inputs_of, linear
from oarsmith.quantize.pieces import Piece, runs_of
from oarsmith.quantize.rounding import Rounding, round_weight
from oarsmith.quantize.scheme import MapScheme, Scheme
from oarsmith.quantize.walk import Batch, Stream, Tap, run_block

# An expert is taken to have seen so many tokens like those of all experts, beside its own: what few tokens say of it
# alone is mostly chance.
_PRIOR_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class PieceResult:
    """What became of a piece.

    Attributes:
        error: squared error of its outputs (of its weights where no inputs were seen), relative.
        num_tokens: that went through it in calibration.
    """

    piece: Piece
    scheme: MapScheme
    quantized: Quantized
    error: float
    num_tokens: int
    input_scale: float | None = None


@dataclass
class Walk:
    """Calibration text on its way through the layers.

    Attributes:
        own: in the model as it is quantized.
        original: in the model in floats, where an algorithm asks for it.
    """

    batches: Sequence[Batch]
    own: Stream
    original: Stream | None = None


@torch.no_grad()
def round_layer(
    spec: LayerSpec,
    block: Block,
    pieces: Mapping[str, list[Piece]],
    scheme: Scheme,
    rounding: Rounding,
    walk: Walk | None,
    activations: Activations,
) -> list[PieceResult]:
    """Round a layer's maps; the block holds what the numbers stand for afterwards, and the streams are behind it.

    Args:
        walk: None where nothing is calibrated.
    """
    original: dict[str, list[Tensor]] = {}
    if walk is not None and walk.original is not None:
        original = _original_inputs(block, walk, [path for path in pieces if linear(block, path).spec.experts is None])
    results: list[PieceResult] = []
    for one in inputs_of(spec):
        paths = [path for path in one.maps if path in pieces]
        if not paths:
            continue
        seen = None
        if walk is not None and (rounding.needs_inputs or activations.static):
            seen = _Seen(block, paths, original)
            run_block(block, walk.batches, walk.own, activations.taps | seen.taps, keys=activations.keys, enough=True)
        for path in paths:
            results += _round_map(block, path, pieces[path], scheme, rounding, seen)
        activations.add(...)
    if walk is not None:
        run_block(block, walk.batches, walk.own, activations.taps, keys=activations.keys, into=walk.own)
    return results
