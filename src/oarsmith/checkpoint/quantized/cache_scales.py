"""How a compressed-tensors checkpoint wants keys and values to be kept: ``kv_cache_scheme`` in its config, and a scale
for each layer (or each kv head) beside its attention, ``X.self_attn.k_scale`` and ``v_scale``; older files have
``X.k_proj.output_scale`` and ``X.v_proj.output_scale``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from oarsmith.checkpoint.config_file import read_config
from oarsmith.checkpoint.quantized.unpacked import QUANTIZATION
from oarsmith.checkpoint.source import open_source
from oarsmith.checkpoint.tensors import FLOATS, TensorSource
from oarsmith.errors import CheckpointError
from oarsmith.models.cache_form import CacheForm, HeadScales

# The first number in a name is that of its layer.
_NAME = re.compile(r"\D*?\.(\d+)\..*?(?:(?P<own>[kv])_scale|(?P<old>[kv])_proj\.output_scale)")
_CODES = {"int": "int", "float": "e4m3"}


def read_cache_form(directory: Path, num_layers: int) -> CacheForm | None:
    """The form that a checkpoint's cache is to have; None: it says nothing of it.

    E4M3 without scales in the files has none; whole numbers without them, or with such that change with every token
    (``dynamic``), come in groups with scales of their own.

    Raises:
        CheckpointError: a scheme that is not known, or scales that are missing for a layer or are none.
    """
    scheme = _scheme(read_config(directory))
    if scheme is None:
        return None
    code = _CODES.get(str(scheme.get("type")))
    if code is None or scheme.get("num_bits") != 8 or scheme.get("symmetric") is False:
        what = f"keys and values of {scheme.get('num_bits')} bits of type {scheme.get('type')!r} are not known"
        raise CheckpointError(what, where=f"{directory / 'config.json'}: kv_cache_scheme", fix="take it out")
    with open_source(directory) as source:
        found = {} if scheme.get("dynamic") is True else _scales(source)
    if not found:
        return CacheForm(code="int" if code == "int" else "e4m3")
    layers = []
    for layer in range(num_layers):
        pair = found.get((layer, "k")), found.get((layer, "v"))
        if pair[0] is None:
            raise _bad(directory, f"there is no scale of the keys of layer {layer}, but of others")
        # Of latents, which are keys and values at once, there is one.
        layers.append((pair[0], pair[0] if pair[1] is None else pair[1]))
    return CacheForm(code="int" if code == "int" else "e4m3", scales=tuple(layers))


def _scheme(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    for key in QUANTIZATION:
        quantization = config.get(key)
        if isinstance(quantization, dict) and isinstance(quantization.get("kv_cache_scheme"), dict):
            scheme: Mapping[str, Any] = quantization["kv_cache_scheme"]
            return scheme
    return None


def _scales(source: TensorSource) -> dict[tuple[int, str], HeadScales]:
    found = {}
    for name in source.shapes:
        match = _NAME.fullmatch(name)
        if match is not None:
            where = int(match[1]), match["own"] or match["old"]
            found[where] = _checked(source, name, source.read(name))
    return found


def _checked(source: TensorSource, name: str, scale: Tensor) -> HeadScales:
    values = tuple(scale.float().flatten().tolist()) if source.dtypes[name] in FLOATS else ()
    if not values or not all(0 < value < float("inf") for value in values):
        raise _bad(source.directory, f"{name} is no scale: {values}")
    return values


def _bad(directory: Path, what: str) -> CheckpointError:
    return CheckpointError(what, where=str(directory), fix="copy the model again")
