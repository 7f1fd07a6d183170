"""Decoders from and to Hugging Face directories: config.json + safetensors, through the family's name operators."""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oarsmith.checkpoint.atomic import atomic_write_text
from oarsmith.checkpoint.safetensors_stream import MAX_SHARD_BYTES, ShardedSafetensorsWriter, TensorInfo
from oarsmith.checkpoint.source import TensorSource
from oarsmith.errors import CheckpointError, ModelError
from oarsmith.models import families
from oarsmith.models.decoder import Decoder
from oarsmith.models.names import Duplicate, Ignored, NameMap, Place
from oarsmith.models.spec import DecoderSpec, linear_specs

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_FLOATS = ("F64", "F32", "F16", "BF16")
GENERATION_CONFIG = "generation_config.json"
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def read_config(directory: Path) -> dict[str, Any]:
    """``config.json`` of a model directory.

    Raises:
        CheckpointError: no such directory or file, or not a JSON object.
    """
    path = directory / "config.json"
    if not path.is_file():
        if directory.is_file():
            fix = f"oarsmith convert {directory} OUT" if directory.suffix == ".gguf" else "name the model's directory"
            raise CheckpointError("this is a file, not a model directory", where=str(directory), fix=fix)
        what = "no config.json in the directory" if directory.is_dir() else "no such directory"
        raise CheckpointError(what, where=str(directory), fix="check the path to the model")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"not valid JSON: {error}", where=str(path), fix="copy the file again") from error
    if not isinstance(config, dict):
        raise CheckpointError("must hold one JSON object", where=str(path))
    return config


def load_decoder(
    directory: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    rewrite: Callable[[families.Family, DecoderSpec], DecoderSpec] | None = None,
) -> Decoder:
    """A decoder with a checkpoint's weights.

    Built on the meta device and filled by streaming: beside the model itself only one tensor is held at a time.

    Args:
        dtype: of the weights in memory; None keeps the widest the files hold.
        rewrite: changes the spec before modules exist. Parameters it adds stay uninitialised on ``device``.

    Raises:
        CheckpointError: a missing, surplus or misshapen tensor (named), or a damaged file.
    """
    config = read_config(directory)
    family, spec = families.build_spec(config)
    with TensorSource(directory) as source:
        model = empty_decoder(
            rewrite(family, spec) if rewrite else spec, config, dtype or source.stored_dtype(), device
        )
        fill(model, family.names(model.spec), source)
    generation = directory / GENERATION_CONFIG
    if generation.is_file():
        model.generation_config = generation.read_text(encoding="utf-8")
    return model


def empty_decoder(
    spec: DecoderSpec, config: Mapping[str, Any], dtype: torch.dtype, device: torch.device | None = None
) -> Decoder:
    """A decoder with memory but no values."""
    with torch.device("meta"):
        model = Decoder(spec, config)
    return model.to(dtype).to_empty(device=device or torch.device("cpu"))


@torch.no_grad()
def fill(model: Decoder, names: NameMap, source: TensorSource) -> None:
    """Copy every tensor of the source to its place; each parameter the family names must be filled exactly."""
    parameters = dict(model.named_parameters())
    file_names = _match_names(names, source)
    filled: Counter[str] = Counter()
    for place in names.places:
        target = place.view(parameters[place.parameter])
        _copy(source, file_names[place.file], target)
        filled[place.parameter] += target.numel()
    for name, count in filled.items():
        assert count == parameters[name].numel(), f"{name}: {count} of {parameters[name].numel()} elements have a place"
    model.file_names = {name: actual for name, actual in file_names.items() if name != actual}


def _copy(source: TensorSource, name: str, target: Tensor) -> None:
    """One tensor; it is gone when this returns, before the next one is read."""
    if source.dtypes[name] not in _FLOATS:
        raise CheckpointError(
            f"tensor {name} is stored as {source.dtypes[name]}: quantized weights",
            where=str(source.directory),
            fix="use the model's unquantized checkpoint",
        )
    if source.shapes[name] != tuple(target.shape):
        raise CheckpointError(
            f"tensor {name} has shape {source.shapes[name]}, the config asks for {tuple(target.shape)}",
            where=str(source.directory),
            fix="config.json and weights do not belong together; copy both from the same model",
        )
    target.copy_(source.read(name))


def _match_names(names: NameMap, source: TensorSource) -> dict[str, str]:
    """Canonical name -> name in the file, for every place; the rest of the file must be ignorable."""
    prefix, present = names.optional_prefix, set(source.shapes)
    found, missing = {}, []
    for place in names.places:
        short = place.file.removeprefix(prefix)
        actual = next((name for name in (place.file, short) if name in present), None)
        if actual is None:
            missing.append(place.file)
        else:
            found[place.file] = actual
    surplus = present - set(found.values())
    for operator in names.operators:
        if isinstance(operator, Ignored):
            surplus = {n for n in surplus if not any(re.fullmatch(operator.pattern, c) for c in (n, prefix + n))}
        elif isinstance(operator, Duplicate):
            surplus.discard(operator.file)
    if missing or surplus:
        raise _mismatch(missing, sorted(surplus), source)
    return found


def _mismatch(missing: list[str], surplus: list[str], source: TensorSource) -> CheckpointError:
    parts = []
    if missing:
        near = difflib.get_close_matches(missing[0], surplus, n=1)
        hint = f" (the file has {near[0]})" if near else ""
        parts.append(f"{len(missing)} tensors are missing, first {missing[0]}{hint}")
    if surplus:
        parts.append(f"{len(surplus)} tensors have no place in this model, first {surplus[0]}")
    return CheckpointError(
        "; ".join(parts), where=str(source.directory), fix="check that config.json describes these weights"
    )


def write_decoder(model: Decoder, directory: Path, *, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write config.json and safetensors into an existing directory (inside ``atomic_directory``).

    Names, order and dtype are those the family's files have; a round trip is bit for bit.

    Raises:
        ModelError: the model carries an adapter, which must be merged or saved on its own.
    """
    rewritten = [path for path, linear in linear_specs(model.spec) if linear.rewrite is not None]
    if rewritten:
        raise ModelError(
            f"the model carries an adapter on {len(rewritten)} linear maps, first {rewritten[0]}",
            fix="save the adapter, or merge it first (oarsmith merge-adapter)",
        )
    family = families.find(model.config)
    write_named(dict(iter_named(model, family.names(model.spec))), directory, max_shard_bytes=max_shard_bytes)
    dtype = _NAMES[next(model.parameters()).dtype]
    key = "dtype" if "dtype" in model.config else "torch_dtype"
    atomic_write_text(directory / "config.json", json.dumps({**model.config, key: dtype}, indent=2) + "\n")
    if model.generation_config is not None:
        atomic_write_text(directory / GENERATION_CONFIG, model.generation_config)


def iter_named(model: Decoder, names: NameMap) -> list[tuple[str, Tensor]]:
    """(file name, view of the parameter) for every tensor the family writes, in its order."""
    parameters = dict(model.named_parameters())
    return [
        (model.file_names.get(place.file, place.file), place.view(parameters[place.parameter]).detach())
        for place in names.places
    ]


def write_named(tensors: Mapping[str, Tensor], directory: Path, *, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Stream tensors into ``model.safetensors`` or shards with an index."""
    infos = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with ShardedSafetensorsWriter(directory, infos, max_shard_bytes=max_shard_bytes) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def projection_places(names: NameMap) -> dict[str, Place]:
    """Module name in the family's own spelling (``model.layers.0.self_attn.q_proj``) -> where its weight lies.

    This is what adapter files and target lists refer to.
    """
    return {
        place.file.removesuffix(".weight"): place
        for place in names.places
        if place.segment is not None and place.file.endswith(".weight")
    }
