"""Weights that PaddleNLP has quantized: int8 or E4M3 in its files, their scales in ``weight_scales.json``.

A scale there is the largest magnitude that is told apart: w = number / 127 * scale (448 of E4M3), one for each output
or one for the weight. Shapes: O out features, I in features.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oarsmith.checkpoint.files import read_json_object, require_inside
from oarsmith.checkpoint.paddle.names import PaddleFamily, layout, paddle_family
from oarsmith.checkpoint.quantized.base import CodedSource, Packed
from oarsmith.checkpoint.tensors import FLOATS, TensorSource
from oarsmith.errors import CheckpointError
from oarsmith.kernels.coded import E4M3, INT8, CodedWeight

WEIGHT_SCALES, ACTIVATION_SCALES, CACHE_SCALES = "weight_scales.json", "act_scales.json", "cachekv_scales.json"
LARGEST: Mapping[str, float] = {"int": 127.0, "e4m3": 448.0}
"""What the scales of the files are divided by."""

CODES = {"I8": "int", "F8_E4M3": "e4m3"}
_KINDS = {"float16": "F16", "bfloat16": "BF16"}


def weight_key(name: str) -> str:
    """Under which ``weight_scales.json`` has the scales of PaddleNLP's tensor ``X.weight``."""
    return f"{name.removesuffix('.weight')}.weight_quanter"


def activation_key(name: str) -> str:
    """Under which ``act_scales.json`` has the scale of what goes into it."""
    return f"{name.removesuffix('.weight')}.activation_quanter"


def cache_keys(family: PaddleFamily, attention: str) -> tuple[str, str]:
    """Under which ``cachekv_scales.json`` has the scales of keys and values of an attention module."""
    path = layout(family, f"{attention}.q_proj.weight", 2).names[0].rpartition(".")[0].rpartition(".")[0]
    return f"{path}.cachek_matmul.activation_quanter", f"{path}.cachev_matmul.activation_quanter"


def read_scales(directory: Path, file: str) -> dict[str, Tensor]:
    """The scales of a file as fp64 [N]; none where there is no such file.

    Raises:
        CheckpointError: something that is not a number, nor a list of them.
    """
    path = directory / file
    if not path.is_file():
        return {}
    found = {}
    for key, value in read_json_object(require_inside(directory, path)).items():
        values = value if isinstance(value, list) else [value]
        if not values or not all(type(number) in (int, float) for number in values):
            raise CheckpointError("not a number, nor a list of them", where=f"{path}: {key}")
        found[key] = torch.tensor(values, dtype=torch.float64)
    return found


class QuantizedPaddle(CodedSource):
    """A PaddleNLP directory under Hugging Face names, its quantized weights as the floats they stand for."""

    def __init__(self, inner: TensorSource, config: Mapping[str, Any]) -> None:
        super().__init__(inner)
        self.family = paddle_family(config)
        self._scales_O: dict[str, Tensor] = {}
        self._columns: set[str] = set()
        scales = read_scales(inner.directory, WEIGHT_SCALES)
        kind = _KINDS.get(str(config.get("torch_dtype")), "F32")
        for name, code in inner.dtypes.items():
            if code not in CODES:
                continue
            shape = self._shape(name, code, 2)
            where = layout(self.family, name, 2)
            parts = [scales.get(weight_key(part)) for part in where.names]
            size = shape[0] if where.transposed else shape[1]
            self._scales_O[name] = self._joined(name, parts, size) / LARGEST[CODES[code]]
            if not where.transposed:
                self._columns.add(name)
            self._replace(name, shape, kind, name)

    def _joined(self, name: str, parts: list[Tensor | None], size: int) -> Tensor:
        each, found = size // len(parts), []
        for part in parts:
            if part is None or len(part) not in (1, each):
                what = "no scales" if part is None else f"{len(part)} scales"
                raise self._misfit(name, f"{what} in {WEIGHT_SCALES} for {each} outputs")
            found.append(part.expand(each))
        return torch.cat(found)

    def quantized(self) -> dict[str, str]:
        """The weights in 8 bits, and the code of each."""
        return {name: CODES[self._inner.dtypes[name]] for name in self._scales_O}

    def scale_name(self, name: str) -> str:
        return f"{WEIGHT_SCALES}: {weight_key(layout(self.family, name, 2).names[0])}"

    def packed(self, name: str) -> Packed:
        numbers, scales_O = self._inner.read(name), self._scales_O[name].float()
        weight = CodedWeight(
            code=E4M3 if numbers.dtype == torch.float8_e4m3fn else INT8,
            group=numbers.shape[1],
            in_features=numbers.shape[1],
            codes_OB=numbers.contiguous().view(torch.uint8),
            scale_OG=scales_O[:, None],
        )
        return Packed(weight)

    def coded(self, name: str) -> CodedWeight | None:
        return None if name in self._columns else super().coded(name)

    def unpack(self, name: str) -> Tensor:
        if name not in self._columns:
            return super().unpack(name)
        numbers, scales_O = self._inner.read(name), self._scales_O[name].float()
        result = (numbers.float() * scales_O).to(FLOATS[self.dtypes[name]])
        if not bool(torch.isfinite(result).all()):
            raise self._misfit(name, "a weight is NaN or infinite")
        return result
