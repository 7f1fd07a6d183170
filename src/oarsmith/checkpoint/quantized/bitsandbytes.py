"""bitsandbytes: nf4 and fp4 with their quant_state, and int8 with a scale a row.

``X.weight`` is then uint8 [numbers / 2, 1] with ``X.weight.absmax`` and what describes it, or int8 [O, I] with
``X.SCB``, the largest magnitude of each row.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from oarsmith.checkpoint.quantized.base import CodedSource, Config, Packed
from oarsmith.checkpoint.quantized.integers import float_kind, stems
from oarsmith.checkpoint.tensors import TensorSource
from oarsmith.kernels.coded import FP4, INT8, NF4, Code, CodedWeight

_STATE = ".quant_state.bitsandbytes__"
_CODES = {code.name: code for code in (NF4, FP4)}
_KINDS = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


@dataclass(frozen=True)
class _State:
    """What ``quant_state`` says of a weight."""

    code: Code
    block: int
    shape: tuple[int, int]
    nested_block: int
    offset: float


class BitsAndBytesSource(CodedSource):
    """``X.weight`` from what bitsandbytes keeps of it."""

    def __init__(self, inner: TensorSource, config: Config, quantization: Config) -> None:
        super().__init__(inner)
        self._states: dict[str, _State] = {}
        for kind, code in _CODES.items():
            for name in stems(inner, _STATE + kind):
                self._take4(name, code)
        for stem in stems(inner, ".SCB"):
            shape = self._shape(f"{stem}.weight", "I8", 2)
            if self._inner.shapes[f"{stem}.SCB"] != shape[:1] or self._inner.dtypes[f"{stem}.SCB"] not in (
                "F32",
                "F16",
            ):
                raise self._misfit(f"{stem}.SCB", f"no scale for each of {shape[0]} rows")
            self._replace(f"{stem}.weight", shape, float_kind(config, "F32"), f"{stem}.weight", f"{stem}.SCB")
        self._drop(".weight_format")

    def scale_name(self, name: str) -> str:
        return f"{name}.absmax" if name in self._states else name.removesuffix("weight") + "SCB"

    def _take4(self, name: str, code: Code) -> None:
        parts = [name, f"{name}.absmax", f"{name}.quant_map", f"{name}{_STATE}{code.name}"]
        said, nested = self._said(parts[-1]), f"{name}.nested_absmax" in self._inner.shapes
        shape, block, nested_block = said.get("shape"), said.get("blocksize"), said.get("nested_blocksize", 1)
        sizes = [*shape, block, nested_block] if isinstance(shape, list) and len(shape) == 2 else [0]
        offset, kind = said.get("nested_offset", 0.0), _KINDS.get(str(said.get("dtype")))
        if not all(type(size) is int and size > 0 for size in sizes) or type(offset) is not float or kind is None:
            raise self._misfit(parts[-1], "it does not say shape, blocksize and dtype of a matrix")
        rows, columns, block, nested_block = sizes
        blocks = -(-rows * columns // block)
        if math.prod(self._shape(name, "U8", 2)) != -(-rows * columns // 2) or block % 2:
            raise self._misfit(name, f"the bytes do not fit a weight of shape {(rows, columns)}")
        if self._shape(f"{name}.absmax", "U8" if nested else "F32", 1) != (blocks,):
            raise self._misfit(f"{name}.absmax", f"there are {blocks} blocks")
        if self._shape(f"{name}.quant_map", "F32", 1) != (16,):
            raise self._misfit(f"{name}.quant_map", "not 16 values")
        if nested:
            parts += [f"{name}.nested_absmax", f"{name}.nested_quant_map"]
            if self._shape(parts[-2], "F32", 1) != (-(-blocks // nested_block),):
                raise self._misfit(parts[-2], f"{blocks} scales do not fit")
            if self._shape(parts[-1], "F32", 1) != (256,):
                raise self._misfit(parts[-1], "not 256 values")
        self._states[name] = _State(code, block, (rows, columns), nested_block if nested else 0, offset)
        self._replace(name, (rows, columns), kind, *parts)

    def _said(self, name: str) -> dict[str, Any]:
        self._shape(name, "U8", 1)
        try:
            said = json.loads(bytes(self._inner.read(name).tolist()))
        except (ValueError, RecursionError) as error:
            raise self._misfit(name, f"not JSON: {error}") from error
        return said if isinstance(said, dict) else {}

    def packed(self, name: str) -> Packed:
        weight = self._inner.read(name)
        if name not in self._states:
            scale = self._inner.read(self.scale_name(name)).float() / 127
            return Packed(
                CodedWeight(
                    code=INT8,
                    group=weight.shape[1],
                    in_features=weight.shape[1],
                    codes_OB=weight.view(torch.uint8),
                    scale_OG=scale[:, None],
                )
            )
        state, absmax = self._states[name], self._absmax(name)
        values = tuple(self._inner.read(f"{name}.quant_map").tolist())
        code = state.code if values == state.code.values else Code("table", 4, values)
        rows, columns = state.shape
        # Blocks lie along the flat weight: where one goes on in the next row, there is but one row.
        flat = columns % state.block != 0
        lead, in_features = (1, rows * columns) if flat else (rows, columns)
        coded = CodedWeight(
            code=code,
            group=state.block,
            in_features=in_features,
            codes_OB=weight.view(lead, -1),
            scale_OG=absmax.view(lead, -1),
        )
        return Packed(coded, shape=state.shape if flat else None)

    def _absmax(self, name: str) -> Tensor:
        state, absmax = self._states[name], self._inner.read(f"{name}.absmax")
        if not state.nested_block:
            return absmax
        table, scale = (self._inner.read(f"{name}.nested_{part}") for part in ("quant_map", "absmax"))
        return table[absmax.int()] * scale.repeat_interleave(state.nested_block)[: len(absmax)] + state.offset
