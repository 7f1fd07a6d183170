"""Adapters in PEFT's layout: adapter_config.json + adapter_model.safetensors, read and written.

Keys are ``base_model.model.{module}.`` and a tensor's name (``lora_A.weight``), with the module names of the base
checkpoint, and ``base_model.`` for what all modules share (``vera_A``). For Conv1D bases (GPT-2) the shapes are the
same and ``fan_in_fan_out`` is true.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oarsmith.adapters.adapted import Adapted, Sittings
from oarsmith.adapters.change import Change, Sitting
from oarsmith.adapters.ends import Ends, base_matrix, end_of, end_places
from oarsmith.adapters.exact_file import read_exact, write_exact
from oarsmith.adapters.linear import adapted_modules
from oarsmith.adapters.methods import find_method
from oarsmith.adapters.part import adapter_parts, with_parts
from oarsmith.adapters.parts import parts_in_file
from oarsmith.adapters.peft_config import CONFIG, read_adapter_config
from oarsmith.adapters.score import scores_in
from oarsmith.adapters.targets import SpecRewrite, adapt_rewrite, target_places
from oarsmith.atomic import atomic_write_text
from oarsmith.checkpoint.config_file import read_config
from oarsmith.checkpoint.files import require_inside
from oarsmith.checkpoint.fingerprint import fingerprint
from oarsmith.checkpoint.safetensors_source import SafetensorsSource
from oarsmith.checkpoint.safetensors_stream import (
    SafetensorsWriter,
    TensorInfo,
    check_safetensors,
    safetensors_metadata,
)
from oarsmith.checkpoint.tensors import FLOATS, TensorSource
from oarsmith.errors import CheckpointError
from oarsmith.models import families
from oarsmith.models.decoder import Decoder
from oarsmith.models.names import Place, transposed

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
_BASE = "base_fingerprint"
SHARED = "base_model."


def adapter_rewrite(directory: Path) -> SpecRewrite:
    """The spec rewrite that gives a decoder the adapter's shape; the weights themselves say which modules and ranks.

    Raises:
        CheckpointError: not an adapter that this version computes.
    """
    config = read_adapter_config(directory)
    infos = check_safetensors(require_inside(directory, directory / WEIGHTS))
    makers, alone = parts_in_file(config, {name: info.shape for name, info in infos.items()})
    if alone:
        return with_parts(lambda _, spec: spec, makers)
    method = find_method(config)
    # As projections have them, which methods read; the longest first: one name may end another.
    plain = {ending: ending for ending in method.change.keys.values()} | dict(method.change.table_keys)
    endings = sorted(plain, key=len, reverse=True)
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, info in infos.items():
        ending = next((e for e in endings if name.endswith(f".{e}")), None)
        if ending is not None:
            module = name.removeprefix(PREFIX).removesuffix(f".{ending}")
            shapes.setdefault(module, {})[plain[ending]] = info.shape

    def choose(modules: Collection[str]) -> Mapping[str, Change]:
        unknown = sorted(set(shapes) - set(modules))
        if unknown or not shapes:
            raise CheckpointError(
                f"the adapter sits on {unknown[0] if unknown else 'nothing'}, which the base model does not have",
                where=str(directory / WEIGHTS),
                fix=f"use the adapter's own base model ({config.values.get('base_model_name_or_path')})",
            )
        return {module: method.read(config, module, own) for module, own in shapes.items()}

    return with_parts(adapt_rewrite(choose), makers)


def adapted_config(directory: Path, base: Path) -> dict[str, Any] | None:
    """The ``config.json`` that a base has under an adapter with a head of scores; None: its own.

    Raises:
        CheckpointError: the adapter or the base's config cannot be read.
    """
    infos = check_safetensors(require_inside(directory, directory / WEIGHTS))
    count = scores_in({name: info.shape for name, info in infos.items()})
    own = read_config(base)
    if count is None or families.build_spec(own)[1].head.num_scores is not None:
        return None
    if count < 1:
        raise CheckpointError("the head of scores is no matrix", where=str(directory / WEIGHTS))
    return families.scoring_config(own, count, padding_id=own.get("pad_token_id"))


@torch.no_grad()
def load_adapter_weights(model: Decoder, directory: Path, *, any_base: bool = False) -> None:
    """Copy an adapter's tensors into a decoder built with :func:`adapter_rewrite`.

    Args:
        any_base: also where the file has matrices of the base that are not this one's.

    Raises:
        CheckpointError: a missing, surplus or misshapen tensor (named), or a damaged file.
    """
    slots = adapter_tensors(model)
    with SafetensorsSource(directory / WEIGHTS) as source:
        copies = _base_copies(model, source, any_base=any_base)
        unknown = sorted(set(source.shapes) - set(slots) - copies)
        missing = sorted(set(slots) - set(source.shapes))
        if unknown or missing:
            raise CheckpointError(
                f"tensor {(unknown or missing)[0]} {'has no place in this model' if unknown else 'is missing'}",
                where=str(directory / WEIGHTS),
            )
        for name, shape in source.shapes.items():
            if name in copies:
                continue
            if tuple(slots[name].shape) != shape:
                raise CheckpointError(
                    f"tensor {name} has shape {shape}, the base model asks for {tuple(slots[name].shape)}",
                    where=str(directory / WEIGHTS),
                    fix="use the adapter's own base model",
                )
            if source.dtypes[name] not in FLOATS:
                raise CheckpointError(f"stored as {source.dtypes[name]}", where=f"{directory / WEIGHTS}: {name}")
        sittings = _sittings(model)
        for change in _distinct(sittings):
            change.restore_shared({name: source.read(f"{SHARED}{name}") for name in change.shared()})
        exact = read_exact(directory, {name: change.exact(on) for name, (on, change) in sittings.items()})
        for name, (on, change) in sittings.items():
            own = {ending: source.read(f"{PREFIX}{name}.{ending}") for ending in change.stored(on)}
            change.restore(on, {**own, **exact.get(name, {})})
        _restore_parts(model, directory, source)


def _base_copies(model: Decoder, source: TensorSource, *, any_base: bool) -> set[str]:
    """The file's tensors that are the base's own embedding or head: PEFT stores these where an adapter sits on them.

    Raises:
        CheckpointError: one is another than the base has.
    """
    found = set()
    for module, place in end_places(families.find(model.config).names(model.spec)).items():
        own = base_matrix(model, end_of(place))
        for name in (f"{PREFIX}{module}.base_layer.weight", f"{PREFIX}{place.file}"):
            if name not in source.shapes or own.is_meta:
                continue
            stored = source.read(name)
            if not any_base and not torch.equal(stored.to(own), own) and not torch.equal(own.to(stored), stored):
                raise CheckpointError(
                    f"the file has a {module} of its own, which is not the base's: it has been changed too",
                    where=f"{source.directory}: {name}",
                    fix="use the base that it was trained on, saved with that matrix, or say any_base true",
                )
            found.add(name)
    return found


def _restore_parts(model: Decoder, directory: Path, source: TensorSource) -> None:
    exact = read_exact(directory, _exact_parts(model))
    for index, part in enumerate(adapter_parts(model)):
        own = {name: source.read(name) for name in part.stored(model)}
        part.restore(model, {**own, **exact.get(_part_name(index), {})})


def _exact_parts(model: Decoder) -> dict[str, Mapping[str, Tensor]]:
    return {_part_name(index): part.exact() for index, part in enumerate(adapter_parts(model))}


def _part_name(index: int) -> str:
    return f"parts.{index}"


def adapted_projections(model: Decoder) -> dict[str, tuple[Adapted, Place, Change]]:
    """The projections that a change sits on by their names: their map, where they lie in it, and the change."""
    modules: dict[str, Adapted] = dict(adapted_modules(model))
    for part in adapter_parts(model):
        if isinstance(part, Ends):
            modules |= part.changed_maps()
    found = {}
    for name, place in target_places(families.find(model.config).names(model.spec)).items():
        linear, segment = modules.get(place.parameter.removesuffix(".weight")), place.segment
        if linear is not None and segment is not None and (change := linear.changes.get(segment)) is not None:
            found[name] = (linear, place, change)
    return found


def _sittings(model: Decoder) -> dict[str, tuple[Sitting, Change]]:
    """The adapters' tensors by the projections they sit on, experts one by one."""
    made: dict[int, list[Sittings]] = {}
    found = {}
    for name, (linear, place, change) in adapted_projections(model).items():
        sittings = made.setdefault(id(linear), linear.sittings())
        found[name] = (sittings[place.expert or 0][place.segment or ""], change)
    return found


def adapter_tensors(model: Decoder) -> dict[str, Tensor]:
    """PEFT key -> what a file holds: mostly the adapter's parameter itself, or an expert's share of it."""
    sittings = _sittings(model)
    shared = {f"{SHARED}{name}": tensor for change in _distinct(sittings) for name, tensor in change.shared().items()}
    own = {
        f"{PREFIX}{name}.{ending}": tensor
        for name, (on, change) in sittings.items()
        for ending, tensor in change.stored(on).items()
    }
    parts = {name: tensor for part in adapter_parts(model) for name, tensor in part.stored(model).items()}
    return shared | own | parts


def _distinct(sittings: Mapping[str, tuple[Sitting, Change]]) -> list[Change]:
    return list(dict.fromkeys(change for _, change in sittings.values()))


def base_hash(directory: Path) -> str | None:
    """The ``fingerprint`` of the base that an adapter was trained on, where its file tells."""
    return safetensors_metadata(directory / WEIGHTS).get(_BASE)


def require_base(directory: Path, base: Path) -> None:
    """Refuse a base that is not the one an adapter was trained on, where its file tells.

    Raises:
        CheckpointError: it is another one.
    """
    wanted = base_hash(directory)
    if wanted is not None and wanted != fingerprint(base):
        raise CheckpointError(
            f"the adapter was trained on another model than {base}: the weights differ",
            where=str(directory),
            fix="name its own base, or say any_base true to use it all the same",
        )


def write_adapter(model: Decoder, directory: Path, *, base: str, base_hash: str | None = None) -> None:
    """Write the adapter into an existing directory (inside ``atomic_directory``).

    Args:
        base: what ``base_model_name_or_path`` shall say.
        base_hash: its ``fingerprint``, for ``require_base``.
    """
    tensors = {name: tensor.detach() for name, tensor in adapter_tensors(model).items()}
    infos = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    metadata = {"format": "pt"} | ({} if base_hash is None else {_BASE: base_hash})
    with SafetensorsWriter(directory / WEIGHTS, infos, metadata=metadata) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    exact = {name: change.exact(on) for name, (on, change) in _sittings(model).items()}
    write_exact(directory, exact | _exact_parts(model))
    projections = adapted_projections(model)
    places = target_places(families.find(model.config).names(model.spec))
    changes = {name: change for name, (_, _, change) in projections.items()}
    config: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
    }
    if changes:
        config |= {
            "fan_in_fan_out": any(place.view is transposed for _, place, _ in projections.values()),
            "target_modules": shortest_names(sorted(projections), list(places)),
            **next(iter(changes.values())).peft_configs(changes),
        }
    for part in adapter_parts(model):
        config |= part.peft_config(model)
    atomic_write_text(directory / CONFIG, json.dumps(config, indent=2) + "\n")


def shortest_names(chosen: list[str], everything: list[str]) -> list[str]:
    """Leaf names where they select exactly the chosen modules, else the full names."""
    leaves = sorted({name.rsplit(".", 1)[-1] for name in chosen})
    selected = {name for name in everything if name.rsplit(".", 1)[-1] in leaves}
    return leaves if selected == set(chosen) else chosen
