"""Decoders from and to Hugging Face directories: config.json + safetensors, through the family's name operators."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oarsmith.atomic import atomic_write_text
from oarsmith.checkpoint.fill import check_fits, fill, materialise, meta_decoder
from oarsmith.checkpoint.quantized.unpacked import QUANTIZATION
from oarsmith.checkpoint.safetensors_stream import MAX_SHARD_BYTES, ShardedSafetensorsWriter, TensorInfo
from oarsmith.checkpoint.source import open_model
from oarsmith.errors import ModelError
from oarsmith.models import families
from oarsmith.models.decoder import Decoder
from oarsmith.models.names import NameMap, Place
from oarsmith.models.spec import DecoderSpec, linear_specs

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GENERATION_CONFIG = "generation_config.json"
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def load_decoder(
    directory: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    rewrite: Callable[[families.Family, DecoderSpec], DecoderSpec] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Decoder:
    """A decoder with a checkpoint's weights.

    Built on the meta device and filled by streaming: beside the model itself only one tensor is held at a time, also
    where a rewrite keeps weights in fewer bits (`Linear.weight_filled`). Weights are read, not mapped: a file that
    changes later changes no model, and one that is cut short kills no process.

    Args:
        dtype: of the weights in memory; None keeps that of most of the files' elements.
        rewrite: changes the spec before modules exist. Parameters it adds stay uninitialised on ``device``.
        config: what the weights are to be used as, where it is not the checkpoint's own (a stretched context). The head
            of a scoring model that is made of one that writes stays uninitialised too.

    Raises:
        CheckpointError: a missing, surplus or misshapen tensor (named), or a damaged file.
    """
    own, opened = open_model(directory)
    # What the caller has read may still say how the files are quantized.
    config = own if config is None else {key: config[key] for key in config if key in own or key not in QUANTIZATION}
    with opened as source:
        family, spec = families.build_spec(config)
        names = family.names(spec)
        if families.has_new_head(own, config):
            names = names.without("head.weight")
        wanted = rewrite(family, spec) if rewrite else spec
        model = meta_decoder(wanted, config, dtype or source.stored_dtype())
        check_fits(model, names, source)
        where = device or torch.device("cpu")
        fill(model, names, source, where)
        materialise(model, where)  # what the files do not have
    generation = directory / GENERATION_CONFIG
    if generation.is_file():
        model.generation_config = generation.read_text(encoding="utf-8")
    return model


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
    if model.spec.parts:
        raise ModelError(
            f"the model carries an adapter: {model.spec.parts[0].what}",
            fix="save the adapter, or merge it first (oarsmith merge-adapter)",
        )
    family, read_again = families.build_spec(model.config)
    if read_again.head.tied and not model.spec.head.tied:
        raise ModelError(
            f"merging gave the head a matrix of its own, but {family.name} models always share the embedding's",
            fix="use the adapter as it is (--adapter), or train it without embedding and head",
        )
    write_named(dict(iter_named(model, family.names(model.spec))), directory, max_shard_bytes=max_shard_bytes)
    dtype = _NAMES[next(model.parameters()).dtype]
    key = "dtype" if "dtype" in model.config else "torch_dtype"
    atomic_write_text(directory / "config.json", json.dumps({**model.config, key: dtype}, indent=2) + "\n")
    if model.generation_config is not None:
        atomic_write_text(directory / GENERATION_CONFIG, model.generation_config)


def iter_named(model: Decoder, names: NameMap) -> list[tuple[str, Tensor]]:
    """(file name, view of the parameter) for every tensor the family writes, in its order."""
    parameters, found = dict(model.named_parameters()), []
    for place in names.places:
        view = place.view(parameters[place.parameter]).detach()
        shaped = view.reshape(place.shape) if place.shape is not None else view
        found.append((model.file_names.get(place.file, place.file), shaped))
    return found


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
