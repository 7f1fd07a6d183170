"""PaddleNLP's files: int8 or E4M3 weights under its names and with its axes, and the scales in JSON beside them.

``weight_scales.json``, ``act_scales.json`` and ``cachekv_scales.json`` hold the largest magnitude that is told apart, a
scale times 127 (448 of E4M3): PaddleNLP's loaders divide by that (ActScalesLoader and WeightScalesLoader in
paddlenlp/experimental/model_utils.py). Shapes: O out, I in features, H heads of keys.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from oarsmith.checkpoint.convert import DTYPE_NAMES
from oarsmith.checkpoint.paddle.config import to_paddle_config
from oarsmith.checkpoint.paddle.names import is_head, layout, paddle_family
from oarsmith.checkpoint.paddle.quantized import (
    ACTIVATION_SCALES,
    CACHE_SCALES,
    LARGEST,
    WEIGHT_SCALES,
    activation_key,
    cache_keys,
    weight_key,
)
from oarsmith.checkpoint.safetensors_stream import TensorInfo
from oarsmith.errors import CheckpointError
from oarsmith.models import families
from oarsmith.quantize.grid import Quantized
from oarsmith.quantize.layouts.base import Layout
from oarsmith.quantize.layouts.contents import Contents, FileMap, usual_scheme
from oarsmith.quantize.layouts.pieces import block_scales

Scales = dict[str, float | list[float]]


class Paddle(Layout):
    """``X.weight`` [in, out] in 8 bits, and three files of scales, which are told as the tensors come."""

    name = "paddle"
    metadata: Mapping[str, str] = {"format": "np"}  # by which readers know that the axes are PaddleNLP's

    def __init__(self, contents: Contents) -> None:
        self._family = paddle_family(contents.config)
        self._unit_rows = families.build_spec(contents.config)[1].head.normalized
        self._weights: Scales = {}
        self._inputs: Scales = {}
        self._caches: Scales = {}

    def check(self, contents: Contents) -> None:
        usual = usual_scheme(contents)
        for one in contents.maps.values():
            grid, inputs = one.grid, one.scheme.activations
            if one.stored == "stacked":
                raise self.refused("a weight with those of all experts in one tensor", one.tensor, "use gguf")
            if grid.bits != 8 or grid.group is not None or grid.rows not in (1, None):
                raise self.refused("other numbers than 8 bits with a scale for each row, or for all", one.tensor)
            if grid.code == "int" and not grid.symmetric:
                raise self.refused("zeros", one.tensor)
            if inputs is not None and (not inputs.static or inputs.code != grid.code):
                raise self.refused("inputs without static scales, or of another code than the weights", one.tensor)
            if (one.grid.code, inputs) != (usual.weights and usual.weights.code, usual.activations):
                raise self.refused("maps of several kinds", one.tensor)
        for name in contents.floats:
            if is_head(name) and self._family.tied_head:
                raise self.refused("a head of its own, which PaddleNLP's models of this family share", name)

    def infos(self, one: FileMap, dtype: torch.dtype) -> Mapping[str, TensorInfo]:
        kind = torch.float8_e4m3fn if one.grid.code == "e4m3" else torch.int8
        shape = (one.out_features, one.in_features)
        return self.float_infos(one.tensor, TensorInfo(kind, shape if one.stored == "rows" else shape[::-1]))

    def tensors(self, one: FileMap, quantized: Quantized, input_scale: Tensor | None) -> Mapping[str, Tensor]:
        numbers_OI, where = quantized.numbers_OI, layout(self._family, one.tensor, 2)
        if one.grid.code == "int":
            numbers_OI = (numbers_OI.to(torch.int16) - one.grid.middle).to(torch.int8)
        scales_O = block_scales(quantized, one.tensor)[:, 0]
        shared = scales_O.expand(len(numbers_OI)) if one.grid.rows is None else scales_O
        for name, part_O in zip(where.names, shared.chunk(len(where.names)), strict=True):
            limits = _limits(part_O, one.grid.code)
            self._weights[weight_key(name)] = limits[0] if one.grid.rows is None else limits
            if input_scale is not None:
                self._inputs[activation_key(name)] = _limits(input_scale, one.grid.code)[0]
        return dict(zip(where.names, where.split(numbers_OI if one.stored == "rows" else numbers_OI.t()), strict=True))

    def float_infos(self, name: str, info: TensorInfo) -> Mapping[str, TensorInfo]:
        where = layout(self._family, name, len(info.shape))
        return dict.fromkeys(where.names, TensorInfo(info.dtype, where.piece_shape(info.shape)))

    def float_tensors(self, name: str, tensor: Tensor) -> Mapping[str, Tensor]:
        where = layout(self._family, name, tensor.dim())
        if is_head(name) and self._unit_rows:  # PaddleNLP does not divide the head's rows by their length
            tensor = functional.normalize(tensor.float())
        return dict(zip(where.names, where.split(tensor), strict=True))

    def cache_infos(self, attention: str, dtype: torch.dtype, num_scales: int) -> Mapping[str, TensorInfo]:
        return {}

    def cache_tensors(self, attention: str, key_scale_H: Tensor, value_scale_H: Tensor) -> Mapping[str, Tensor]:
        for key, scale_H in zip(cache_keys(self._family, attention), (key_scale_H, value_scale_H), strict=True):
            self._caches[key] = _limits(scale_H, "int")
        return {}

    def model_config(self, contents: Contents) -> dict[str, Any]:
        return to_paddle_config(contents.config, DTYPE_NAMES[contents.dtype])

    def config(self, contents: Contents) -> dict[str, Any]:
        usual = usual_scheme(contents)
        assert usual.weights is not None
        if usual.activations is None:
            kind = "weight_only_int8" if usual.weights.code == "int" else "weight_only_fp8"
        else:
            kind = "a8w8" + ("c8" if contents.scheme.cache is not None else "")
            kind += "_fp8" if usual.weights.code == "e4m3" else ""
        return {"quant_type": kind}

    def side_files(self, contents: Contents) -> Mapping[str, str]:
        if contents.scheme.cache is not None and len(self._caches) != 2 * len(contents.attentions):
            raise CheckpointError("scales of keys and values were not given for every layer", where=CACHE_SCALES)
        files = {WEIGHT_SCALES: self._weights, ACTIVATION_SCALES: self._inputs, CACHE_SCALES: self._caches}
        return {name: json.dumps(scales, indent=2) + "\n" for name, scales in files.items() if scales}


def _limits(scale: Tensor, code: str) -> list[float]:
    """In 64 bits, which give the scale back exactly."""
    return [float(value) for value in scale.flatten().double() * LARGEST[code]]
