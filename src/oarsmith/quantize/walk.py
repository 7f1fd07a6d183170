"""A decoder walked one layer at a time over calibration text: memory for one layer, and for what goes between layers.

Shapes: T tokens of a batch, D hidden, I in features, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from oarsmith.models import visibility
from oarsmith.models.block import Block
from oarsmith.models.decoder import Decoder
from oarsmith.models.layout import Layout
from oarsmith.models.position import PositionTables, position_tables
from oarsmith.models.spec import DecoderSpec
from oarsmith.quantize.products import products

Tap = Callable[[Tensor, Sequence[int]], Tensor | None]
"""Told what goes into a map: rows [T, I] and, of stacked maps, how many of them go through each. What it returns, if
anything, goes in instead."""

Keys = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""From a layer's number and its keys and values [T, G, K] to those that are used."""


class _EnoughError(Exception):
    """The last tap of a run has been told."""


@dataclass(frozen=True)
class Batch:
    """Documents that go through a layer together."""

    ids_T: Tensor
    layout: Layout
    tables: PositionTables


def make_batches(spec: DecoderSpec, documents: Sequence[Sequence[int]], max_tokens: int) -> list[Batch]:
    """Documents in batches of at most ``max_tokens`` tokens, or of one document."""
    groups: list[list[Sequence[int]]] = []
    size = max_tokens + 1
    for document in documents:
        if size + len(document) > max_tokens:
            groups.append([])
            size = 0
        groups[-1].append(document)
        size += len(document)
    return [_batch(spec, group) for group in groups]


def _batch(spec: DecoderSpec, documents: Sequence[Sequence[int]]) -> Batch:
    ids_T = torch.tensor([index for document in documents for index in document])
    bounds = [0]
    for document in documents:
        bounds.append(bounds[-1] + len(document))
    positions_T = torch.cat([torch.arange(len(document)) for document in documents])
    layout = Layout.documents(bounds, positions_T).with_whole(
        lambda whole: visibility.apply(spec.visibility, ids_T, whole, None, False)
    )
    rules = {layer.attention.position for layer in spec.layers} - {None}
    tables = position_tables([rule for rule in rules if rule is not None], layout, False)
    return Batch(ids_T, layout, tables)


class Stream:
    """The hidden states [T, D] of every batch before a layer.

    ``folder``: they are kept there in files that the system pages in as they are read; None: in memory.
    """

    def __init__(self, name: str, batches: Sequence[Batch], size: int, folder: Path | None = None) -> None:
        self.states: list[Tensor] = []
        for number, batch in enumerate(batches):
            shape = (len(batch.ids_T), size)
            if folder is None:
                self.states.append(torch.empty(shape))
            else:
                path, count = folder / f"{name}-{number}.bin", shape[0] * shape[1]
                self.states.append(torch.from_file(str(path), shared=True, size=count).view(shape))

    def copy_from(self, other: Stream) -> None:
        """Take another stream's states."""
        for own, states in zip(self.states, other.states, strict=True):
            own.copy_(states)


@torch.no_grad()
def embed(model: Decoder, batches: Sequence[Batch], stream: Stream) -> None:
    """Fill the stream with what the first layer reads. The embedding has its weights."""
    for batch, states_TD in zip(batches, stream.states, strict=True):
        states_TD.copy_(model.embedding(batch.ids_T, batch.layout, None, []))


@torch.no_grad()
def run_block(
    block: Block,
    batches: Sequence[Batch],
    stream: Stream,
    taps: Mapping[str, Tap] | None = None,
    *,
    keys: Keys | None = None,
    into: Stream | None = None,
    enough: bool = False,
    exact: bool = False,
) -> None:
    """Run a layer over all batches.

    Args:
        taps: by the paths of linear maps in the block.
        keys: told the keys and values, and gives those that are used.
        into: where its outputs go; None: nowhere. It may be ``stream``.
        enough: stop each batch once every tap has been told; then there are no outputs.
        exact: products in fp32; else from bf16 factors with fp32 sums, where the CPU has such.
    """
    assert not (enough and into is not None)
    for number, batch in enumerate(batches):
        layout = batch.layout if keys is None else replace(batch.layout, front=keys)
        with products(exact=exact), _tapped(block, taps or {}, enough=enough):
            try:
                output_TD = block(stream.states[number], layout, batch.tables, None)
            except _EnoughError:
                continue
        if into is not None:
            into.states[number].copy_(output_TD)


@contextmanager
def _tapped(block: nn.Module, taps: Mapping[str, Tap], *, enough: bool) -> Iterator[None]:
    left, handles = set(taps), []
    for path, tap in taps.items():

        def told(
            module: nn.Module,
            args: tuple[Tensor, ...] | tuple[Tensor, Sequence[int]],
            path: str = path,
            tap: Tap = tap,
        ) -> tuple[Any, ...] | None:
            x_TI, counts = args[0], args[1] if len(args) > 1 else ()
            assert isinstance(counts, Sequence), type(counts)
            new_TI = tap(x_TI, counts)
            left.discard(path)
            if enough and not left:
                raise _EnoughError
            return None if new_TI is None else (new_TI, *args[1:])

        handles.append(block.get_submodule(path).register_forward_pre_hook(told))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
