"""A model directory quantized to nearest and written through a layout, with what its files must then stand for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from oarsmith.checkpoint.hf import load_decoder
from oarsmith.models.decoder import Decoder
from oarsmith.quantize.grid import Quantized, quantize, range_steps
from oarsmith.quantize.layouts.base import LayoutWriter, open_layout
from oarsmith.quantize.layouts.choose import layout_of
from oarsmith.quantize.layouts.contents import Contents, FileMap, contents_of, dense_tensor
from oarsmith.quantize.scheme import MapScheme, Scheme

FLOAT = MapScheme(weights=None)
INPUT_SCALE = torch.tensor(0.0390625)


@dataclass(frozen=True)
class Written:
    """What was written: the contents, and by the file's names the weights they stand for, with the file's axes."""

    contents: Contents
    expected: Mapping[str, Tensor]
    quantized: Mapping[str, tuple[Quantized, ...]]


def scheme_that_fits(
    model: Decoder, wanted: MapScheme, fits: Callable[[FileMap], bool], scheme: Scheme | None = None
) -> Scheme:
    """``wanted`` for the maps that a layout has a place for; the others stay in floats."""
    scheme = Scheme(name="test", default=wanted, overrides={}) if scheme is None else scheme
    maps = contents_of(model.config, scheme, torch.float32).maps
    left = {stem: FLOAT for stem, one in maps.items() if not fits(one)}
    return replace(scheme, overrides={**left, **scheme.overrides})


def write_quantized(
    model: Decoder, layout: str, scheme: Scheme, directory: Path, dtype: torch.dtype = torch.float32
) -> Written:
    """Round every map to nearest on the scales that the files will hold, and write the model."""
    contents = contents_of(model.config, scheme, dtype)
    chosen = layout_of(layout, contents)
    scale_dtype = chosen.scale_dtype(dtype)
    return fill(model, contents, open_layout(chosen, contents, directory), scale_dtype)


def fill(
    model: Decoder, contents: Contents, opened: AbstractContextManager[LayoutWriter], scale_dtype: torch.dtype
) -> Written:
    """Give a writer the whole model, tensor by tensor."""
    parameters, expected, made = dict(model.named_parameters()), {}, {}
    by_tensor = {one.tensor: one for one in contents.maps.values()}
    with opened as writer:
        for place in contents.places:
            view, one = place.view(parameters[place.parameter].detach()), by_tensor.get(place.file)
            if one is None:
                writer.plain(place.file, view if place.shape is None else view.reshape(place.shape))
                continue
            weights = {"rows": [view], "columns": [view.t()], "stacked": list(parameters[place.parameter].detach())}
            rounded = tuple(round_to(weight, one, scale_dtype) for weight in weights[one.stored])
            static = one.scheme.activations is not None and one.scheme.activations.static
            writer.map(one.stem, rounded, INPUT_SCALE if static else None)
            expected[place.file], made[one.stem] = dense_tensor(place, rounded), rounded
        if contents.scheme.cache is not None:
            for layer, count in enumerate(contents.num_scales):
                scales = (torch.arange(count) + 1) / 128
                writer.cache(layer, scales * (layer + 1), scales / 2)
    return Written(contents, expected, made)


def round_to(weight_OI: Tensor, one: FileMap, scale_dtype: torch.dtype) -> Quantized:
    """To nearest, on scales of this dtype."""
    steps = range_steps(weight_OI.float(), one.grid)
    return quantize(weight_OI.float(), one.grid, replace(steps, scale_OG=steps.scale_OG.to(scale_dtype).float()))


def load(path: Path) -> Decoder:
    """In fp32, without gradients."""
    return load_decoder(path, dtype=torch.float32).eval().requires_grad_(False)
