"""What the files of a quantized model hold, known before a weight is: its tensors, and what each of its maps becomes.

Shapes: O out, I in features, G groups of a row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from oarsmith.checkpoint.fill import file_infos
from oarsmith.checkpoint.quantized.unpacked import QUANTIZATION
from oarsmith.checkpoint.safetensors_stream import TensorInfo
from oarsmith.errors import ModelError
from oarsmith.models import families
from oarsmith.models.names import Duplicate, ExpertRows, NameMap, Place, Rows, transposed, whole
from oarsmith.models.spec import DecoderSpec, linear_specs
from oarsmith.models.spec_parts import GQA
from oarsmith.quantize.grid import Grid, Quantized
from oarsmith.quantize.scheme import MapScheme, Scheme

HEAD = "lm_head"
"""The module of the output matrix; families that share the embedding's have it without a tensor."""


@dataclass(frozen=True, kw_only=True)
class FileMap:
    """A linear map as the files of the float model have it, and what it gets.

    Attributes:
        stem: its tensor's name without ``.weight``; the name of the module.
        tensor: the name itself.
        place: where it lies in the decoder.
        grid: of its weight.
        stored: its axes in the file: [O, I], [I, O] (GPT-2), or all experts' [E, I, O] with outputs in turn (gpt-oss).
    """

    stem: str
    tensor: str
    place: Place
    grid: Grid
    scheme: MapScheme
    out_features: int
    in_features: int
    stored: Literal["rows", "columns", "stacked"]


@dataclass(frozen=True, kw_only=True)
class Contents:
    """A model that is to be written.

    Attributes:
        config: its ``config.json``, without what an earlier quantization left there.
        dtype: of what stays in floats.
        floats: dtype and shape of every tensor of the float model, in the order of the family's files.
        maps: by stem, those that are quantized.
        kept: modules with a matrix that stays in floats: the head, routers, maps without a grid. Not the embeddings.
        attentions: module of each layer's attention.
        num_scales: scales of each layer's keys; as many are its values'.
    """

    config: Mapping[str, Any]
    dtype: torch.dtype
    scheme: Scheme
    floats: Mapping[str, TensorInfo]
    places: tuple[Place, ...]
    maps: Mapping[str, FileMap]
    kept: tuple[str, ...]
    attentions: tuple[str, ...]
    num_scales: tuple[int, ...]

    def of_parameter(self, parameter: str) -> tuple[Place, ...]:
        """The file's tensors that make up a parameter of the decoder."""
        return tuple(place for place in self.places if place.parameter == parameter)


def contents_of(config: Mapping[str, Any], scheme: Scheme, dtype: torch.dtype) -> Contents:
    """What a model of this config holds under a scheme.

    Raises:
        ModelError: a family that is not known.
    """
    plain = {key: value for key, value in config.items() if key not in QUANTIZATION}
    family, spec = families.build_spec(plain)
    names = family.names(spec)
    floats = file_infos(spec, plain, names, dtype)
    maps = dict(_maps(spec, names, floats, scheme))
    return Contents(
        config=plain,
        dtype=dtype,
        scheme=scheme,
        floats=floats,
        places=names.places,
        maps=maps,
        kept=tuple(_kept(names, floats, maps)),
        attentions=tuple(_attentions(spec, names)),
        num_scales=tuple(_num_scales(spec, scheme)),
    )


def _maps(
    spec: DecoderSpec, names: NameMap, floats: Mapping[str, TensorInfo], scheme: Scheme
) -> Iterator[tuple[str, FileMap]]:
    parameters = {f"{path}.weight" for path, _ in linear_specs(spec)}
    for place in names.places:
        stem, shape = place.file.removesuffix(".weight"), floats[place.file].shape
        if place.parameter not in parameters:
            continue
        chosen = scheme.of(stem)
        if chosen.weights is None:
            continue
        stored: Literal["rows", "columns", "stacked"] = "rows"
        if place.view is transposed:
            stored = "columns"
        elif place.view is not whole and not isinstance(place.view, (Rows, ExpertRows)):
            stored = "stacked"
        out_features, in_features = shape[-2:] if stored == "rows" else (shape[-1], shape[-2])
        yield (
            stem,
            FileMap(
                stem=stem,
                tensor=place.file,
                place=place,
                grid=chosen.weights,
                scheme=chosen,
                out_features=out_features,
                in_features=in_features,
                stored=stored,
            ),
        )


def _kept(names: NameMap, floats: Mapping[str, TensorInfo], maps: Mapping[str, FileMap]) -> Iterator[str]:
    """Readers quantize every linear module that is not named; that a head shares its matrix does not hide it."""
    matrices = [
        place.file.removesuffix(".weight")
        for place in names.places
        if len(floats[place.file].shape) == 2 and not place.parameter.startswith("embedding.")
    ]
    copies = [one.file.removesuffix(".weight") for one in names.operators if isinstance(one, Duplicate)]
    yield from dict.fromkeys(stem for stem in (*matrices, *copies, HEAD) if stem not in maps)


def _attentions(spec: DecoderSpec, names: NameMap) -> Iterator[str]:
    for index in range(len(spec.layers)):
        start = f"layers.{index}.attention."
        file = next(place.file for place in names.places if place.parameter.startswith(start) and place.segment)
        yield file.rpartition(".")[0].rpartition(".")[0]


def _num_scales(spec: DecoderSpec, scheme: Scheme) -> Iterator[int]:
    for layer in spec.layers:
        attention = layer.attention
        heads = attention.num_kv_heads if isinstance(attention, GQA) else attention.num_heads
        yield heads if scheme.cache is not None and scheme.cache.per_head else 1


def usual_scheme(contents: Contents) -> MapScheme:
    """What most maps get.

    Raises:
        ModelError: no map is quantized.
    """
    if not contents.maps:
        raise ModelError("no map is quantized", where=contents.scheme.name, fix="give some of them a grid")
    return Counter(one.scheme for one in contents.maps.values()).most_common(1)[0][0]


def file_parts(
    places: Sequence[Place], quantized: Sequence[Quantized]
) -> Iterator[tuple[Place, tuple[Quantized, ...]]]:
    """A parameter's weight as the file's tensors have it.

    Args:
        places: all of the parameter's.
        quantized: the weight [O, I]; of stacked maps, each expert's.

    Yields:
        Each tensor's rows [O, I]; of a tensor of all experts, one entry for each.
    """
    for place in places:
        match place.view:
            case Rows(start=start, stop=stop):
                yield place, (quantized[0].rows(slice(start, stop)),)
            case ExpertRows(expert=expert, start=start, stop=stop):
                yield place, (quantized[expert].rows(slice(start, stop)),)
            case view:
                yield place, (quantized[0],) if view in (whole, transposed) else tuple(quantized)


def dense_tensor(place: Place, quantized: Sequence[Quantized]) -> Tensor:
    """The floats that a tensor of the file stands for, in fp32 and with the file's axes."""
    weights = [one.dense() for one in quantized]
    if place.view is transposed:
        return weights[0].t()
    if place.shape is None:
        return weights[0]
    return place.view(torch.stack(weights)).reshape(place.shape)
