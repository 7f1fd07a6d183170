"""One layer quantized, map after map in the order in which they run.

Shapes: T tokens, I in features, O out features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from oarsmith.models.block import Block
from oarsmith.models.spec import LayerSpec
from oarsmith.quantize.gptq import Hessian, Rounded
from oarsmith.quantize.grid import Quantized
from oarsmith.quantize.inputs import inputs_of, linear
from oarsmith.quantize.learned import Run, learn_layer
from oarsmith.quantize.pieces import Piece, runs_of
from oarsmith.quantize.rounding import Rounding, round_weight
from oarsmith.quantize.running import Running
from oarsmith.quantize.scheme import MapScheme, Scheme
from oarsmith.quantize.walk import Batch, Stream, Tap, run_block

# An expert counts as if so many tokens of all experts' had gone through it too: what few tokens say of it alone is
# mostly chance.
_PRIOR_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class PieceResult:
    """What became of a piece.

    Attributes:
        error: squared error of its outputs (of its weights where no inputs were seen), relative.
        num_tokens: that went through it in calibration; None: none were needed.
        input_scale: of its inputs, where they have a static one.
    """

    piece: Piece
    scheme: MapScheme
    quantized: Quantized
    error: float
    num_tokens: int | None = None
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
    running: Running,
    walk: Walk | None,
) -> list[PieceResult]:
    """Round a layer's maps. Afterwards the block holds what their numbers stand for, and the streams are behind it.

    Args:
        running: how the layer's inputs, keys and values are rounded while the model runs; what must be known of them
            beforehand is found here.
        walk: None where nothing is calibrated.

    Raises:
        OarsmithError: weights or inputs that are not finite.
    """
    original: dict[str, list[Tensor]] = {}
    learned: Mapping[Run, Rounded] = {}
    if walk is not None and walk.original is not None:
        single = [path for path in pieces if linear(block, path).spec.experts is None]
        original = _original_inputs(block, walk, single if rounding.method == "gptaq" else [])
        if rounding.method == "autoround":
            learned = learn_layer(block, pieces, scheme, rounding.autoround, walk.batches, walk.own, walk.original)
    results: list[PieceResult] = []
    for one in inputs_of(spec):
        paths = [path for path in one.maps if path in pieces]
        watched = {path: _Seen(block, path, original.get(path), wanted=rounding.needs_inputs) for path in paths}
        if walk is not None and paths and (rounding.needs_inputs or running.watches(paths)):
            taps: dict[str, Tap] = {path: running.watching(path, seen.add) for path, seen in watched.items()}
            run_block(block, walk.batches, walk.own, {**running.taps, **taps}, keys=running.keys, enough=True)
        for path in paths:
            scale = running.begin(path)
            found = _round_map(block, path, pieces[path], scheme, rounding, watched[path], learned)
            results += [replace(result, input_scale=scale) for result in found]
    if walk is not None:
        run_block(block, walk.batches, walk.own, running.taps, keys=running.keys, into=walk.own)
    return results


def _original_inputs(block: Block, walk: Walk, paths: Sequence[str]) -> dict[str, list[Tensor]]:
    """What goes into maps of the model in floats, batch by batch; its stream is behind the layer then."""
    assert walk.original is not None
    kept: dict[str, list[Tensor]] = {path: [] for path in paths}

    def keep(path: str) -> Tap:
        # In bf16: it is half the memory, and what is added up is a difference of thousands of tokens.
        return lambda x_TI, counts: kept[path].append(x_TI.bfloat16())

    run_block(block, walk.batches, walk.original, {path: keep(path) for path in paths}, into=walk.original)
    return kept


class _Seen:
    """What rounding must know of the inputs of a map, or of each expert's."""

    def __init__(self, block: Block, path: str, original: list[Tensor] | None, *, wanted: bool) -> None:
        spec = linear(block, path).spec
        self._original, self._next, self.wanted = original, 0, wanted
        self.each = [Hessian(spec.in_features, cross=original is not None) for _ in range(spec.experts or 1)]

    def add(self, x_TI: Tensor, counts: Sequence[int]) -> None:
        """A batch."""
        if not self.wanted:
            return
        full = None if self._original is None else self._original[self._next].float()
        self._next += 1
        rows = x_TI.split(list(counts)) if counts else [x_TI]
        for hessian, own in zip(self.each, rows, strict=True):
            hessian.add(own, full)

    def of(self, expert: int | None) -> Hessian | None:
        """Of a map or an expert; None: nothing has gone through it."""
        if not any(hessian.num_tokens for hessian in self.each):
            return None
        if expert is None:
            return self.each[0]
        return self.each[expert].beside(self.each, _PRIOR_TOKENS)


def _round_map(
    block: Block,
    path: str,
    pieces: Sequence[Piece],
    scheme: Scheme,
    rounding: Rounding,
    seen: _Seen,
    learned: Mapping[Run, Rounded],
) -> list[PieceResult]:
    """Round the pieces of a map, those of the same scheme together."""
    weight, results = linear(block, path).weight, list[PieceResult]()
    for own, run in runs_of(list(pieces), scheme):
        if own.weights is None:
            continue
        expert = run[0].expert
        matrix = weight if expert is None else weight[expert]
        start, stop = run[0].start, len(matrix) if run[-1].stop is None else run[-1].stop
        hessian = seen.of(expert)
        rounded = learned.get((path, expert, start, stop))
        if rounded is None:
            rounded = round_weight(matrix[start:stop], own.weights, hessian, rounding, run[0].stem)
        matrix[start:stop] = rounded.quantized.dense()
        num_tokens = seen.each[expert or 0].num_tokens if seen.wanted else None
        for piece in run:
            rows = slice(piece.start - start, None if piece.stop is None else piece.stop - start)
            results.append(
                PieceResult(
                    piece=piece,
                    scheme=own,
                    quantized=rounded.quantized.rows(rows),
                    error=rounded.error,
                    num_tokens=num_tokens,
                )
            )
    return results
