"""A model quantized from its files, a layer at a time: what comes out goes to a writer part by part.

Shapes: D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oarsmith.checkpoint.fill import meta_decoder
from oarsmith.checkpoint.source import open_model
from oarsmith.checkpoint.streamed import Streamer
from oarsmith.errors import ModelError
from oarsmith.models import families
from oarsmith.models.block import Block
from oarsmith.models.decoder import Decoder
from oarsmith.models.families import Family
from oarsmith.models.norm import RMSNorm
from oarsmith.models.spec import DecoderSpec, LayerSpec
from oarsmith.models.spec_parts import GQA
from oarsmith.quantize.activations import Method
from oarsmith.quantize.layer import PieceResult, Walk, round_layer
from oarsmith.quantize.pieces import pieces_of
from oarsmith.quantize.prepare import Preparation, prepare_layer
from oarsmith.quantize.rotate import random_rotation
from oarsmith.quantize.rounding import Rounding
from oarsmith.quantize.running import Running
from oarsmith.quantize.scheme import Scheme
from oarsmith.quantize.turn import Turn, check_turns, clear_gains, turn_block, turn_embedding, turned_head, untied
from oarsmith.quantize.walk import Stream, embed, make_batches


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is done to a model.

    Attributes:
        act_method: how static scales of activations are found, and ``cache_method`` those of keys and values.
        rotate: turn it first, with this seed; None: no.
        batch_tokens: of calibration text that go through a layer together.
        folder: where activations lie between layers; None: in memory.
    """

    scheme: Scheme
    rounding: Rounding
    act_method: Method = "abs_max"
    cache_method: Method = "abs_max"
    preparation: Preparation = field(default_factory=Preparation)
    rotate: int | None = None
    batch_tokens: int = 2048
    folder: Path | None = None

    @property
    def calibrates(self) -> bool:
        """Whether text must be read."""
        return (
            self.rounding.needs_inputs
            or not self.preparation.nothing
            or self.scheme.cache is not None
            or any(own.activations is not None and own.activations.static for own in self.scheme.all_maps())
        )


@dataclass(frozen=True)
class Part:
    """A part of the quantized model: what its files hold of it.

    Attributes:
        parameters: by the decoder's names, in fp32.
        pieces: what takes the place of a linear map's weight, by its name in the files: one, or one for each expert of
            a tensor that holds them all.
        cache: static scales of keys and of values, one for each kv head or one for all.
    """

    parameters: Mapping[str, Tensor]
    pieces: Mapping[str, list[PieceResult]] = field(default_factory=dict)
    cache: tuple[Tensor, Tensor] | None = None
    layer: int | None = None


class Subject:
    """A model that is quantized: its files, and the shape of what is written.

    Attributes:
        config: what goes beside the written weights, without what says how they are quantized.
    """

    def __init__(self, directory: Path, recipe: Recipe) -> None:
        read, self.source = open_model(directory)
        self.family: Family
        self.family, self.spec = families.build_spec(read)
        self.config: dict[str, Any] = dict(read)
        self.target: DecoderSpec = self.spec
        if recipe.rotate is not None:
            check_turns(self.spec)
            self.config = untied(self.config)
            self.target = families.build_spec(self.config)[1]
            if self.target.head.tied:
                raise not_untied(self.family.name)
        self.model = meta_decoder(self.spec, read, torch.float32).eval().requires_grad_(False)
        self.streamer = Streamer(self.model, self.family.names(self.spec), self.source)
        self.names = self.family.names(self.target)


def not_untied(family: str) -> ModelError:
    return ModelError(
        f"the model cannot be rotated: a head of its own has no place in the files of {family}",
        where="rotate",
        fix="leave rotate out",
    )


def quantize_parts(subject: Subject, recipe: Recipe, documents: Sequence[Sequence[int]]) -> Iterator[Part]:
    """The parts of the quantized model in order: embedding, layers, head.

    Args:
        documents: token ids that are calibrated on; none where the recipe needs none.

    Raises:
        OarsmithError: weights or activations that are not finite.
    """
    model, streamer = subject.model, subject.streamer
    turns = None if recipe.rotate is None else _Turns(subject.spec, recipe.rotate)
    walk = _walk(subject, recipe, documents)
    with streamer.loaded("embedding"):
        head_table = model.embedding.weight.clone() if turns is not None and subject.spec.head.tied else None
        if turns is not None:
            turn_embedding(model, turns.stream)
        if walk is not None:
            embed(model, walk.batches, walk.own)
            if walk.original is not None:
                walk.original.copy_from(walk.own)
        yield Part(_parameters(model, "embedding"))
    for index, (layer, block) in enumerate(zip(subject.spec.layers, model.blocks(), strict=True)):
        with streamer.loaded(f"layers.{index}"):
            if turns is not None:
                turn_block(layer, block, turns.stream, turns.values(layer))
            yield _layer(subject, recipe, index, layer, block, walk)
    yield from _head(subject, turns, head_table)


def _walk(subject: Subject, recipe: Recipe, documents: Sequence[Sequence[int]]) -> Walk | None:
    if not recipe.calibrates:
        return None
    batches, size = make_batches(subject.spec, documents, recipe.batch_tokens), subject.spec.hidden_size
    original = Stream("original", batches, size, recipe.folder) if recipe.rounding.needs_original else None
    return Walk(batches, Stream("own", batches, size, recipe.folder), original)


def _layer(subject: Subject, recipe: Recipe, index: int, layer: LayerSpec, block: Block, walk: Walk | None) -> Part:
    pieces = pieces_of(subject.names, index, block)
    running = Running(pieces, recipe.scheme, recipe.act_method, recipe.cache_method)
    if walk is not None and not recipe.preparation.nothing:
        prepare_layer(layer, block, pieces, recipe.scheme, recipe.preparation, walk.batches, walk.own)
    results = round_layer(layer, block, pieces, recipe.scheme, recipe.rounding, running, walk)
    found: dict[str, list[PieceResult]] = {}
    for result in results:
        found.setdefault(result.piece.stem, []).append(result)
    return Part(_parameters(subject.model, f"layers.{index}"), found, running.cache_scales, index)


def _head(subject: Subject, turns: _Turns | None, table: Tensor | None) -> Iterator[Part]:
    model = subject.model
    last = [name for name in ("final_norm", "head") if name in dict(model.named_children())]
    with subject.streamer.loaded(*last):
        parameters = {name: value for part in last for name, value in _parameters(model, part).items()}
        if turns is not None:
            assert isinstance(model.final_norm, RMSNorm)
            own = model.head.weight if table is None else table
            assert own is not None
            parameters["head.weight"] = turned_head(own, model.final_norm, turns.stream)
            clear_gains(model.final_norm)
        yield Part(parameters)


def _parameters(model: Decoder, path: str) -> dict[str, Tensor]:
    return {f"{path}.{name}": value.detach() for name, value in model.get_submodule(path).named_parameters()}


class _Turns:
    """The rotations of a model: one of the stream, and one of each size of head."""

    def __init__(self, spec: DecoderSpec, seed: int) -> None:
        self._seed = seed
        self.stream: Turn = random_rotation(spec.hidden_size, seed).apply
        self._values: dict[int, Turn] = {}

    def values(self, layer: LayerSpec) -> Turn | None:
        """Of a layer's values, where its attention is plain."""
        if not isinstance(layer.attention, GQA):
            return None
        dim = layer.attention.head_dim
        return self._values.setdefault(dim, random_rotation(dim, self._seed + 1).apply)
