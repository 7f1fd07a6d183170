"""Bits chosen layer by layer: as few as a KL divergence allows.

What a layer costs at so many bits is measured: all other layers stay as they are, and the output of the whole model is
compared. The costs of all layers are taken to add up, as small ones nearly do, and the bytes that save most divergence
each are spent first. Shapes: N places, V vocabulary.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from oarsmith.models.block import Block
from oarsmith.quantize.grid import quantize
from oarsmith.quantize.inputs import linear
from oarsmith.quantize.model import Subject
from oarsmith.quantize.pieces import Piece, pieces_of
from oarsmith.quantize.scheme import Scheme
from oarsmith.quantize.walk import Stream, embed, make_batches, run_block

BITS = (2, 3, 4, 8)
# Places whose logits exist at a time.
_PLACES = 256


@dataclass(frozen=True)
class LayerCosts:
    """A layer: KL divergence in nats at each of the bits, and numbers that have these bits."""

    kl: Mapping[int, float]
    numel: int


def choose_bits(costs: Sequence[LayerCosts], budget: float) -> list[int]:
    """Bits of each layer, of least size with a sum of costs up to the budget; the most bits where none has."""
    options = [sorted(layer.kl) for layer in costs]
    at = [0] * len(costs)
    total = sum(layer.kl[options[index][0]] for index, layer in enumerate(costs))
    queue: list[tuple[float, int, int]] = []

    def offer(index: int) -> None:
        """The best step of a layer by what it saves for each bit: not the next where a later is better."""
        own, here = costs[index], options[index][at[index]]
        steps = [
            ((own.kl[here] - own.kl[bits]) / ((bits - here) * own.numel), step)
            for step, bits in enumerate(options[index])
            if step > at[index]
        ]
        if steps:
            gain, step = max(steps)
            heapq.heappush(queue, (-gain, index, step))

    for index in range(len(costs)):
        offer(index)
    while total > budget and queue:
        _, index, step = heapq.heappop(queue)
        total += costs[index].kl[options[index][step]] - costs[index].kl[options[index][at[index]]]
        at[index] = step
        offer(index)
    return [options[index][step] for index, step in enumerate(at)]


@torch.no_grad()
def measure_costs(
    subject: Subject,
    scheme: Scheme,
    documents: Sequence[Sequence[int]],
    bits: Sequence[int] = BITS,
    progress: Callable[[int], None] = lambda done: None,
) -> list[LayerCosts]:
    """What each layer costs, rounded to nearest on the scheme's grids with other bits.

    The layers behind it run too, so this takes (layers + 3) / 2 passes for each of the bits.
    """
    model, streamer = subject.model, subject.streamer
    batches = make_batches(subject.spec, documents, 2048)
    size, num_layers = subject.spec.hidden_size, len(subject.spec.layers)
    original = Stream("original", batches, size)
    tried = {count: Stream(str(count), batches, size) for count in bits}
    blocks = list(model.blocks())
    with streamer.loaded("embedding"):
        embed(model, batches, original)
    before = [states.clone() for states in original.states]
    for index, block in enumerate(blocks):
        with streamer.loaded(f"layers.{index}"):
            run_block(block, batches, original, into=original)
    reference = _logprobs(subject, original)
    for states, begin in zip(original.states, before, strict=True):
        states.copy_(begin)
    costs = []
    for index, block in enumerate(blocks):
        pieces = pieces_of(subject.names, index, block)
        with streamer.loaded(f"layers.{index}"):
            numel = sum(linear(block, path).weight.numel() for path in pieces)
            kept = {path: linear(block, path).weight.clone() for path in pieces}
            for count, stream in tried.items():
                _round(block, pieces, scheme, count)
                run_block(block, batches, original, into=stream)
                for path, weight in kept.items():
                    linear(block, path).weight.copy_(weight)
            run_block(block, batches, original, into=original)
        for later in range(index + 1, num_layers):
            with streamer.loaded(f"layers.{later}"):
                for stream in tried.values():
                    run_block(blocks[later], batches, stream, into=stream)
        costs.append(LayerCosts({n: _divergence(reference, _logprobs(subject, s)) for n, s in tried.items()}, numel))
        progress(index + 1)
    return costs


def _round(block: Block, pieces: Mapping[str, list[Piece]], scheme: Scheme, bits: int) -> None:
    """Round a layer's maps to nearest, with other bits. In place."""
    for path, own in pieces.items():
        weight = linear(block, path).weight
        for piece in own:
            grid = scheme.of(piece.stem).weights
            if grid is not None:
                rows = (weight if piece.expert is None else weight[piece.expert])[piece.start : piece.stop]
                rows.copy_(quantize(rows, replace(grid, bits=bits)).dense())


def bits_of_maps(subject: Subject, bits: Sequence[int]) -> dict[str, int]:
    """The bits of every map by its name in the files, of those of layers."""
    return {
        piece.stem: bits[index]
        for index, block in enumerate(subject.model.blocks())
        for pieces in pieces_of(subject.names, index, block).values()
        for piece in pieces
    }


def _logprobs(subject: Subject, stream: Stream) -> list[Tensor]:
    """log p [N, V] of every eighth place: divergences are means, and layers are compared on the same places."""
    model = subject.model
    last = [name for name in ("final_norm", "head") if name in dict(model.named_children())]
    hidden_ND = torch.cat(stream.states)[::8]
    with subject.streamer.loaded(*last, *(["embedding"] if subject.spec.head.tied else [])):
        return [model.logits(part).float().log_softmax(-1) for part in hidden_ND.split(_PLACES)]


def _divergence(reference: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    total = sum(float((p.exp() * (p - q)).sum()) for p, q in zip(reference, found, strict=True))
    return max(total / sum(len(p) for p in reference), 0.0)
