"""The models of a merge: opened by path, read tensor by tensor, with their adapters on them.

Names are those of the family's files, whichever of its spellings a file uses. Of a family that is not known they are
the file's own, and layers are found by the first number in a name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from oarsmith.checkpoint.config_file import read_config
from oarsmith.checkpoint.fill import check_tensor, file_infos, match_names
from oarsmith.checkpoint.source import open_model, open_source
from oarsmith.checkpoint.tensors import FLOATS, TensorSource
from oarsmith.checkpoint.verify import digest
from oarsmith.errors import CheckpointError, ModelError
from oarsmith.model_path import resolve
from oarsmith.models import families
from oarsmith.models.fresh import LAYER_COUNTS, LAYER_LISTS
from oarsmith.models.names import Duplicate, NameMap
from oarsmith.models.spec import DecoderSpec

if TYPE_CHECKING:
    from oarsmith.merge.overlay import AdapterOverlay

_LAYER = re.compile(r"(?<![\w])(\d+)(?=\.)")


@dataclass(frozen=True)
class Place:
    """Where a tensor of a file stands.

    Attributes:
        layer: number of its layer; None: outside of them.
        last: outside and behind the layers (norm, head), not before them.
        vocabulary: it has a row a token.
    """

    layer: int | None
    last: bool = False
    vocabulary: bool = False


@dataclass(frozen=True)
class ModelFiles:
    """What a merge needs to open a model, in any process: paths, and an adapter on top."""

    reference: str
    base: Path
    adapter: Path | None = None


def find_model(reference: str) -> ModelFiles:
    """A model by what a recipe calls it: a path, ``path+adapter``, an adapter or a run folder.

    Raises:
        CheckpointError: there is nothing of that name.
    """
    path, adapter = Path(reference), None
    if not path.exists() and "+" in reference:
        before, _, after = reference.rpartition("+")
        path, adapter = Path(before), Path(after)
    if not path.exists() or (adapter is not None and not adapter.exists()):
        missing = path if not path.exists() else adapter
        raise CheckpointError(
            "there is no such model" if missing is path else "there is no such adapter",
            where=str(missing),
            fix="give the path of a model on this computer (download it first); adapters as MODEL+ADAPTER",
        )
    if path.is_file():
        return ModelFiles(reference, path, adapter)
    where = resolve(path, adapter)
    return ModelFiles(reference, where.base, where.adapter)


@dataclass
class MergeModel:
    """An open model.

    Attributes:
        config: its ``config.json``.
        shapes: canonical name -> shape.
        places: canonical name -> where it stands.
        num_layers: how many layers it has.
        spec: of its decoder; None: a family that is not known.
        tied: the name of the embedding that a head which the file lacks is.
    """

    files: ModelFiles
    config: Mapping[str, Any]
    source: TensorSource
    shapes: dict[str, tuple[int, ...]]
    places: dict[str, Place]
    num_layers: int
    spec: DecoderSpec | None
    tied: Mapping[str, str]
    _actual: Mapping[str, str]
    _overlay: AdapterOverlay | None = None
    digests: dict[str, str] = field(default_factory=dict)

    @property
    def reference(self) -> str:
        return self.files.reference

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most of its weights."""
        return self.source.stored_dtype()

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype that a tensor is stored in."""
        return FLOATS[self.source.dtypes[self._actual[self.tied.get(name, name)]]]

    def read(self, name: str) -> Tensor:
        """A tensor, with what the adapter does to it (then in float32).

        Raises:
            CheckpointError: the file has changed or an adapter does not fit.
        """
        actual = self._actual[self.tied.get(name, name)]
        tensor = self.source.read(actual)
        if name not in self.digests:
            self.digests[name] = digest(tensor)
        return tensor if self._overlay is None else self._overlay.apply(name, tensor)

    def close(self) -> None:
        self.source.close()
        if self._overlay is not None:
            self._overlay.close()


def open_for_merge(files: ModelFiles) -> MergeModel:
    """Open a model: headers are read, no weights.

    Raises:
        OarsmithError: no model, damaged files, weights that are not floats, an adapter that cannot be folded in.
    """
    config = read_config(files.base)
    try:
        family, spec = families.build_spec(config)
    except ModelError:
        known = {name for one in families.known() for name in one.model_types}
        if config.get("model_type") in known or files.adapter is not None:
            raise
        return _unknown_family(files, config)
    config, source = open_model(files.base)
    names = family.names(spec)
    actual = match_names(names, source)
    infos = file_infos(spec, config, names, torch.float32)
    for name, file_name in actual.items():
        check_tensor(source, file_name, infos[name].shape)
    overlay = None
    if files.adapter is not None:
        # Adapters are many files, which take 0.4 s to import.
        from oarsmith.merge.overlay import AdapterOverlay

        overlay = AdapterOverlay(files.adapter, files.base, names)
    return MergeModel(
        files=files,
        config=config,
        source=source,
        shapes={name: source.shapes[file_name] for name, file_name in actual.items()},
        places=_places(names),
        num_layers=len(spec.layers),
        spec=spec,
        tied=_tied_names(names),
        _actual=actual,
        _overlay=overlay,
    )


def _places(names: NameMap) -> dict[str, Place]:
    found = {}
    for place in names.places:
        head, _, rest = place.parameter.partition(".")
        layer = int(rest.split(".")[0]) if head == "layers" else None
        rows = place.parameter in ("embedding.weight", "head.weight", "head.bias")
        found[place.file] = Place(layer, layer is None and head != "embedding", rows)
    return found


def _tied_names(names: NameMap) -> dict[str, str]:
    """Names under which others store what this family's files have once: the head of a tied model."""
    first = {place.parameter: place.file for place in reversed(names.places)}
    return {one.file: first[one.parameter] for one in names.operators if isinstance(one, Duplicate)}


def _unknown_family(files: ModelFiles, config: Mapping[str, Any]) -> MergeModel:
    source = open_source(files.base)
    odd = [name for name, code in source.dtypes.items() if code not in FLOATS]
    if odd:
        raise CheckpointError(
            f"tensor {odd[0]} is stored as {source.dtypes[odd[0]]}: only floats can be merged",
            where=str(files.base),
            fix="use the model's unquantized checkpoint",
        )
    places, size = {}, config.get("vocab_size")
    for name, shape in source.shapes.items():
        number = _LAYER.search(name)
        rows = number is None and bool(shape) and shape[0] == size and len(shape) == 2
        first = re.search(r"emb|wte|wpe", name) is not None
        layer = None if number is None else int(number.group(1))
        places[name] = Place(layer, layer is None and not first, rows)
    layers = {place.layer for place in places.values() if place.layer is not None}
    return MergeModel(
        files=files,
        config=config,
        source=source,
        shapes=dict(source.shapes),
        places=places,
        num_layers=max(layers, default=-1) + 1,
        spec=None,
        tied={},
        _actual={name: name for name in source.shapes},
    )


def at_layer(name: str, old: int, new: int) -> str:
    """The name that a layer's tensor has in another layer."""
    match = next(match for match in _LAYER.finditer(name) if int(match.group(1)) == old)
    return f"{name[: match.start()]}{new}{name[match.end() :]}"


def with_layers(config: Mapping[str, Any], chosen: list[int], num_layers: int) -> dict[str, Any]:
    """A config for these layers of a model that has ``num_layers``; lists with an entry a layer follow.

    Raises:
        ModelError: the config does not say how many layers there are.
    """
    keys = [key for key in LAYER_COUNTS if config.get(key) == num_layers]
    if not keys:
        raise ModelError(
            f"config.json does not say that there are {num_layers} layers, so their number cannot be changed",
            where="config.json",
            fix=f"one of {', '.join(LAYER_COUNTS)} says it in files that can be stacked",
        )
    made = {**config, **dict.fromkeys(keys, len(chosen))}
    for key in LAYER_LISTS:
        value = config.get(key)
        if isinstance(value, list) and len(value) == num_layers:
            made[key] = [value[index] for index in chosen]
    return made
