"""How a quantized checkpoint wants what flows through the model to be rounded: inputs of maps, keys and values.

Shapes: H heads of keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from oarsmith.checkpoint.config_file import read_config
from oarsmith.checkpoint.paddle.names import layout
from oarsmith.checkpoint.paddle.quantized import (
    ACTIVATION_SCALES,
    CACHE_SCALES,
    LARGEST,
    QuantizedPaddle,
    activation_key,
    cache_keys,
    read_scales,
)
from oarsmith.checkpoint.paddle.source import is_paddle
from oarsmith.checkpoint.quantized.unpacked import QUANTIZATION
from oarsmith.checkpoint.source import open_model, open_source
from oarsmith.checkpoint.tensors import TensorSource
from oarsmith.checkpoint.text_part import text_part
from oarsmith.errors import CheckpointError
from oarsmith.models.rounding import Activations, CacheScheme

_SCALES = (".weight_scale", ".weight_scale_inv")
Code = Literal["int", "e4m3"]


@dataclass(frozen=True, kw_only=True)
class StoredScheme:
    """What a checkpoint says beside its weights; all empty of one that does not round anything else.

    Attributes:
        activations: by the maps' names in the files (``model.layers.0.mlp.up_proj``).
        input_scales: one number in fp32, for maps whose inputs have a static scale.
        cache: how keys and values are kept.
        key_scales: by the name of the attention module, [1] or [H] in fp32. ``value_scales`` likewise.
    """

    activations: Mapping[str, Activations] = field(default_factory=dict)
    input_scales: Mapping[str, Tensor] = field(default_factory=dict)
    cache: CacheScheme | None = None
    key_scales: Mapping[str, Tensor] = field(default_factory=dict)
    value_scales: Mapping[str, Tensor] = field(default_factory=dict)


def read_scheme(directory: Path) -> StoredScheme:
    """What the model in a directory says.

    Raises:
        CheckpointError: as `stored_scheme`, or there is no model.
    """
    opened = open_model(directory)[1] if is_paddle(directory) else text_part(open_source(directory))
    with opened as source:
        return stored_scheme(read_config(directory), source)


def stored_scheme(config: Mapping[str, Any], source: TensorSource) -> StoredScheme:
    """What a config says with its ``quantization_config``, and the tensors of its files as they are.

    Args:
        source: of PaddleNLP's files, what `open_model` gives.

    Raises:
        CheckpointError: rounding of a kind that is not known, or a scale that is missing or no number.
    """
    if isinstance(source, QuantizedPaddle):
        return _paddle(source)
    said = next((config[key] for key in QUANTIZATION if isinstance(config.get(key), dict)), None)
    if said is None:
        return StoredScheme()
    method = said.get("quant_method", "compressed-tensors")
    if method not in ("compressed-tensors", "fp8"):
        return StoredScheme()
    stems = [name.removesuffix(end) for name in source.shapes for end in _SCALES if name.endswith(end)]
    chosen = _compressed(said, stems) if method == "compressed-tensors" else _native(said, stems)
    activations = dict(chosen)
    cache = said.get("kv_cache_scheme")
    parts = {}
    for part in ("k", "v"):
        ending = f".{part}_scale"
        names = [name for name in source.shapes if name.endswith(ending)] if cache else []
        parts[part] = {name.removesuffix(ending): _scale(source, name) for name in names}
    static = [stem for stem, one in activations.items() if one.static]
    return StoredScheme(
        activations=activations,
        input_scales={stem: _scale(source, f"{stem}.input_scale") for stem in static},
        cache=_cache(cache) if isinstance(cache, dict) else None,
        key_scales=parts["k"],
        value_scales=parts["v"],
    )


def _compressed(said: Mapping[str, Any], stems: list[str]) -> Iterator[tuple[str, Activations]]:
    groups = [group for group in (said.get("config_groups") or {}).values() if isinstance(group, dict)]
    for stem in stems:
        found = _group_of(stem, groups)
        inputs = None if found is None else found.get("input_activations")
        if isinstance(inputs, dict):
            yield stem, _activations(inputs)


def _group_of(stem: str, groups: list[dict[str, Any]]) -> dict[str, Any] | None:
    """A module's own name comes before patterns of names, and those before its class."""
    ranks: dict[int, dict[str, Any]] = {}
    for group in groups:
        for target in group.get("targets") or ():
            if target == stem:
                ranks.setdefault(0, group)
            elif str(target).startswith("re:") and re.match(str(target)[3:], stem):
                ranks.setdefault(1, group)
            elif target == "Linear":
                ranks.setdefault(2, group)
    return ranks[min(ranks)] if ranks else None


def _activations(inputs: Mapping[str, Any]) -> Activations:
    strategy, dynamic = inputs.get("strategy"), bool(inputs.get("dynamic"))
    group = inputs.get("group_size") if strategy == "group" else None
    kinds = ("token", "tensor", "group") if dynamic else ("tensor",)
    if inputs.get("num_bits", 8) != 8 or not inputs.get("symmetric", True) or strategy not in kinds:
        raise _unknown(f"inputs in {inputs.get('num_bits')} bits, strategy {strategy!r}, dynamic {dynamic}")
    return Activations(code=_code(inputs), static=not dynamic, group=group)


def _cache(cache: Mapping[str, Any]) -> CacheScheme:
    strategy = cache.get("strategy", "tensor")
    if cache.get("num_bits", 8) != 8 or strategy not in ("tensor", "attn_head") or cache.get("dynamic"):
        raise _unknown(f"keys and values in {cache.get('num_bits')} bits, strategy {strategy!r}")
    return CacheScheme(code=_code(cache), per_head=strategy == "attn_head")


def _code(arguments: Mapping[str, Any]) -> Code:
    return "e4m3" if arguments.get("type") == "float" else "int"


def _native(said: Mapping[str, Any], stems: list[str]) -> Iterator[tuple[str, Activations]]:
    static, block = said.get("activation_scheme") == "static", said.get("weight_block_size")
    group = block[1] if isinstance(block, list) and len(block) == 2 and not static else None
    for stem in stems:
        yield stem, Activations(code="e4m3", static=static, group=group)


def _paddle(source: QuantizedPaddle) -> StoredScheme:
    quantized, limits = source.quantized(), read_scales(source.directory, ACTIVATION_SCALES)
    activations, input_scales = {}, {}
    for name, code in quantized.items():
        # A map in several pieces has one input.
        limit = limits.get(activation_key(layout(source.family, name, 2).names[0]))
        if limit is not None:
            stem, known = name.removesuffix(".weight"), _known(code)
            activations[stem] = Activations(code=known, static=True)
            input_scales[stem] = (limit / LARGEST[known]).float()
    caches = read_scales(source.directory, CACHE_SCALES)
    keys, values = {}, {}
    for attention in dict.fromkeys(name.rpartition(".")[0].rpartition(".")[0] for name in source.shapes):
        key, value = cache_keys(source.family, attention)
        if key in caches and value in caches:
            keys[attention] = (caches[key] / LARGEST["int"]).float()
            values[attention] = (caches[value] / LARGEST["int"]).float()
    per_head = any(len(scale) > 1 for scale in keys.values())
    return StoredScheme(
        activations=activations,
        input_scales=input_scales,
        cache=CacheScheme(per_head=per_head) if keys else None,
        key_scales=keys,
        value_scales=values,
    )


def _known(code: str) -> Code:
    return "e4m3" if code == "e4m3" else "int"


def _scale(source: TensorSource, name: str) -> Tensor:
    if name not in source.shapes:
        raise CheckpointError("the tensor is missing", where=f"{source.directory}: {name}", fix="copy the model again")
    scale = source.read(name).float().flatten()
    if not bool(torch.isfinite(scale).all()) or not len(scale):
        raise CheckpointError("a scale is NaN or infinite", where=f"{source.directory}: {name}")
    return scale


def _unknown(what: str) -> CheckpointError:
    return CheckpointError(f"{what}: not known", where="config.json: quantization_config", fix="load the weights alone")
