"""LoRA adapters in PEFT's layout: adapter_config.json + adapter_model.safetensors, read and written.

Keys are ``base_model.model.{module}.lora_A.weight`` [r, in] and ``.lora_B.weight`` [out, r], with the module names of
the base checkpoint; for Conv1D bases (GPT-2) the shapes are the same and ``fan_in_fan_out`` is true.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oarsmith.adapters.lora import LoraSegment, lora_modules, lora_scale
from oarsmith.adapters.targets import lora_rewrite
from oarsmith.atomic import atomic_write_text
from oarsmith.checkpoint.files import read_json_object, require_inside
from oarsmith.checkpoint.hf import projection_places
from oarsmith.checkpoint.safetensors_source import SafetensorsSource
from oarsmith.checkpoint.safetensors_stream import SafetensorsWriter, TensorInfo, check_safetensors
from oarsmith.checkpoint.tensors import FLOATS
from oarsmith.errors import CheckpointError
from oarsmith.models import families
from oarsmith.models.decoder import Decoder
from oarsmith.models.families import Family
from oarsmith.models.names import transposed
from oarsmith.models.spec import DecoderSpec

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
# Options that change the arithmetic and belong to other methods: refusing beats computing something else.
_MUST_BE_EMPTY = (
    "use_dora",
    "modules_to_save",
    "trainable_token_indices",
    "layer_replication",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "target_parameters",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
# The other initialisations (pissa, olora, corda, loftq, lora_ga, ...) change the base's weights too: such an adapter
# fits only that changed base, and PEFT writes True here once it has been converted to the original one.
_KEEP_BASE = (None, True, False, "gaussian", "orthogonal", "eva")


def read_adapter_config(directory: Path) -> dict[str, Any]:
    """``adapter_config.json``, refused unless it describes plain LoRA.

    Raises:
        CheckpointError: missing file, another method, or an option this version does not compute.
    """
    path = directory / CONFIG
    if not path.is_file():
        raise CheckpointError(f"no {CONFIG} in the directory", where=str(directory), fix="check the adapter's path")
    config = read_json_object(require_inside(directory, path))
    if config.get("peft_type") != "LORA":
        kind = config.get("peft_type")
        raise CheckpointError(f"adapters of type {kind!r} cannot be read", where=str(path), fix="known: LORA")
    used = [key for key in _MUST_BE_EMPTY if config.get(key)]
    if used:
        raise CheckpointError(f"LoRA with {', '.join(used)} cannot be read by this version", where=str(path))
    if config.get("init_lora_weights") not in _KEEP_BASE:
        raise CheckpointError(
            f"init_lora_weights {config['init_lora_weights']!r} has changed the base model's weights too",
            where=str(path),
            fix="convert it in PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )
    _check_numbers(config, str(path))
    return config


def _check_numbers(config: Mapping[str, Any], where: str) -> None:
    """What enters the arithmetic must be numbers, and patterns must be patterns."""
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"alpha_pattern is {patterns!r}, not an object", where=where)
    numbers = {"lora_alpha": config.get("lora_alpha", 8), "lora_dropout": config.get("lora_dropout") or 0.0, **patterns}
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e6:
            raise CheckpointError(f"{value!r} is not a number of sane size", where=f"{where}: {key}")
    if not 0 <= numbers["lora_dropout"] < 1:
        raise CheckpointError(f"{numbers['lora_dropout']} is not in [0, 1)", where=f"{where}: lora_dropout")
    for key in patterns:
        try:
            re.compile(key)
        except re.error as error:
            raise CheckpointError(f"{key!r} is not a pattern: {error}", where=f"{where}: alpha_pattern") from error


def adapter_rewrite(directory: Path) -> Callable[[Family, DecoderSpec], DecoderSpec]:
    """The spec rewrite that gives a decoder the adapter's shape; the weights themselves say which modules and ranks."""
    config = read_adapter_config(directory)
    ranks = {}
    for name, info in check_safetensors(require_inside(directory, directory / WEIGHTS)).items():
        if name.endswith(".lora_A.weight"):
            if len(info.shape) != 2 or info.shape[0] == 0:
                raise CheckpointError(f"shape {info.shape} is not [rank, in]", where=f"{directory / WEIGHTS}: {name}")
            ranks[name.removeprefix(PREFIX).removesuffix(".lora_A.weight")] = info.shape[0]

    def choose(modules: list[str]) -> Mapping[str, LoraSegment]:
        unknown = sorted(set(ranks) - set(modules))
        if unknown or not ranks:
            raise CheckpointError(
                f"the adapter sits on {unknown[0] if unknown else 'nothing'}, which the base model does not have",
                where=str(directory / WEIGHTS),
                fix=f"use the adapter's own base model ({config.get('base_model_name_or_path')})",
            )
        rslora = bool(config.get("use_rslora"))
        return {
            module: LoraSegment(name="", rank=rank, scale=lora_scale(_alpha(config, module), rank, rslora))
            for module, rank in ranks.items()
        }

    return lora_rewrite(choose, float(config.get("lora_dropout") or 0.0))


def _alpha(config: Mapping[str, Any], module: str) -> float:
    """lora_alpha, or the value of the first ``alpha_pattern`` key that ends the module's name (PEFT's rule)."""
    for key, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return float(value)
    return float(config.get("lora_alpha", 8))  # PEFT's default


@torch.no_grad()
def load_adapter_weights(model: Decoder, directory: Path) -> None:
    """Copy an adapter's tensors into a decoder built with :func:`adapter_rewrite`."""
    slots = adapter_tensors(model) | _bias_slots(model)
    with SafetensorsSource(directory / WEIGHTS) as source:
        unknown = sorted(set(source.shapes) - set(slots))
        missing = sorted(set(adapter_tensors(model)) - set(source.shapes))
        if unknown or missing:
            raise CheckpointError(
                f"tensor {(unknown or missing)[0]} {'has no place in this model' if unknown else 'is missing'}",
                where=str(directory / WEIGHTS),
            )
        for name, shape in source.shapes.items():
            if tuple(slots[name].shape) != shape:
                raise CheckpointError(
                    f"tensor {name} has shape {shape}, the base model asks for {tuple(slots[name].shape)}",
                    where=str(directory / WEIGHTS),
                    fix="use the adapter's own base model",
                )
            if source.dtypes[name] not in FLOATS:
                raise CheckpointError(f"stored as {source.dtypes[name]}", where=f"{directory / WEIGHTS}: {name}")
            source.read_into(name, slots[name])


def adapter_tensors(model: Decoder) -> dict[str, Tensor]:
    """PEFT key -> the adapter parameter itself, or an expert's share of it."""
    modules = dict(lora_modules(model))
    found = {}
    for module, place in projection_places(families.find(model.config).names(model.spec)).items():
        linear, segment = modules.get(place.parameter.removesuffix(".weight")), place.segment
        if linear is not None and segment is not None and segment in linear.lora_A:
            a, b = linear.lora_A[segment], linear.lora_B[segment]
            found[f"{PREFIX}{module}.lora_A.weight"] = a if place.expert is None else a[place.expert]
            found[f"{PREFIX}{module}.lora_B.weight"] = b if place.expert is None else b[place.expert]
    return found


def _bias_slots(model: Decoder) -> dict[str, Tensor]:
    """Biases PEFT stores beside an adapter trained with ``bias`` all or lora_only (a base_layer in newer files)."""
    parameters, found = dict(model.named_parameters()), {}
    for place in families.find(model.config).names(model.spec).places:
        if place.file.endswith(".bias"):
            target = place.view(parameters[place.parameter].data)
            found[f"{PREFIX}{place.file}"] = target
            found[f"{PREFIX}{place.file.removesuffix('bias')}base_layer.bias"] = target
    return found


def write_adapter(model: Decoder, directory: Path, *, base: str, settings: Mapping[str, Any]) -> None:
    """Write the adapter into an existing directory (inside ``atomic_directory``).

    Args:
        base: what ``base_model_name_or_path`` shall say.
        settings: r, lora_alpha, lora_dropout, use_rslora as the run was configured.
    """
    tensors = {name: tensor.detach() for name, tensor in adapter_tensors(model).items()}
    infos = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with SafetensorsWriter(directory / WEIGHTS, infos) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    modules = sorted({name.removeprefix(PREFIX).rsplit(".lora_", 1)[0] for name in tensors})
    places = projection_places(families.find(model.config).names(model.spec))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": any(places[module].view is transposed for module in modules),
        "inference_mode": True,
        "target_modules": shortest_names(modules, list(places)),
        **settings,
    }
    atomic_write_text(directory / CONFIG, json.dumps(config, indent=2) + "\n")


def shortest_names(chosen: list[str], everything: list[str]) -> list[str]:
    """Leaf names where they select exactly the chosen modules, else the full names."""
    leaves = sorted({name.rsplit(".", 1)[-1] for name in chosen})
    selected = {name for name in everything if name.rsplit(".", 1)[-1] in leaves}
    return leaves if selected == set(chosen) else chosen
