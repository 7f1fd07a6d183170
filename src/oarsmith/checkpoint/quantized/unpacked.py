"""Which format a quantized checkpoint has, and the plain model it stands for."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from oarsmith.checkpoint.files import read_json_object, require_inside
from oarsmith.checkpoint.quantized.awq import AwqSource
from oarsmith.checkpoint.quantized.base import Config, Replaced
from oarsmith.checkpoint.quantized.bitsandbytes import BitsAndBytesSource
from oarsmith.checkpoint.quantized.compressed import CompressedSource
from oarsmith.checkpoint.quantized.fp8 import Fp8Source
from oarsmith.checkpoint.quantized.gptq import GptqSource
from oarsmith.checkpoint.quantized.mxfp4 import Mxfp4Source
from oarsmith.checkpoint.tensors import FLOATS, TensorSource
from oarsmith.errors import CheckpointError

QUANTIZATION = ("quantization_config", "compression_config")
"""Keys of ``config.json`` that say how the files are quantized; the second one is old."""

Reader = Callable[[TensorSource, Config, Config], Replaced]

_READERS: dict[str, Reader] = {
    "awq": AwqSource,
    "bitsandbytes": BitsAndBytesSource,
    "compressed-tensors": CompressedSource,
    "fbgemm_fp8": Fp8Source,
    "fp8": Fp8Source,
    "gptq": GptqSource,
    "mxfp4": Mxfp4Source,
}
# Before config.json said it; the method is what wrote such a file.
_SIDE_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


def unpacked(config: Mapping[str, Any], source: TensorSource) -> tuple[dict[str, Any], TensorSource]:
    """Config and tensors of the plain model; both as they are where nothing is quantized.

    Raises:
        CheckpointError: a format that is not read, or a weight whose parts do not fit each other.
    """
    quantization = _quantization(config, source)
    if quantization is None:
        return dict(config), source
    plain = {key: value for key, value in config.items() if key not in QUANTIZATION}
    method = str(quantization.get("quant_method"))
    if re.fullmatch(r"(intel/)?auto-round", method):
        packing = str(quantization.get("packing_format", "auto_round:auto_gptq"))
        method = next((known for known in ("gptq", "awq") if packing == f"auto_round:auto_{known}"), packing)
    reader = _READERS.get(method)
    if reader is not None:
        return plain, reader(source, config, quantization)
    if all(code in FLOATS for code in source.dtypes.values()):
        return plain, source  # somebody has written the floats, and left the note that they were quantized
    raise CheckpointError(
        f"quantized weights of the format {method!r} are not read",
        where=str(source.directory),
        fix=f"use the model's unquantized checkpoint, or one in {', '.join(_READERS)}",
    )


def _quantization(config: Mapping[str, Any], source: TensorSource) -> Mapping[str, Any] | None:
    for key in QUANTIZATION:
        found = config.get(key)
        if isinstance(found, dict):
            return {"quant_method": "compressed-tensors", **found} if key == "compression_config" else found
    if any(name.endswith(".qweight") for name in source.shapes):
        for file, method in _SIDE_FILES.items():
            path = source.directory / file
            if path.is_file():
                return {"quant_method": method, **read_json_object(require_inside(source.directory, path))}
    return None
