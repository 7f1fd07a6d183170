"""What PaddleNLP's adapters of every method share: modules under its names, and folders that are read back.

Shapes: I in features, O out features.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oarsmith.adapters.change import Size
from oarsmith.adapters.peft_config import CONFIG
from oarsmith.adapters.peft_layout import WEIGHTS, shortest_names
from oarsmith.atomic import atomic_directory, atomic_write_text
from oarsmith.checkpoint.convert import DTYPE_NAMES
from oarsmith.checkpoint.fill import file_infos
from oarsmith.checkpoint.hf import projection_places
from oarsmith.checkpoint.paddle.config import to_paddle_config
from oarsmith.checkpoint.paddle.names import Layout, layout, paddle_family
from oarsmith.checkpoint.paddle.pdparams import PdparamsWriter
from oarsmith.checkpoint.paddle.ranks import Ranks
from oarsmith.checkpoint.safetensors_source import SafetensorsSource
from oarsmith.checkpoint.safetensors_stream import SafetensorsWriter, TensorInfo
from oarsmith.checkpoint.tensors import TensorSource
from oarsmith.checkpoint.verify import Digests, compare
from oarsmith.errors import CheckpointError
from oarsmith.models import families
from oarsmith.models.names import transposed


@dataclass(frozen=True)
class Module:
    """A projection: its Hugging Face name, where its weight lies in PaddleNLP, and [in, out] of each part there."""

    name: str
    where: Layout
    size: tuple[int, int]
    conv1d: bool

    def parts(self) -> list[str]:
        return [name.removesuffix(".weight") for name in self.where.names]

    @property
    def whole(self) -> Size:
        """Of the projection."""
        return Size(self.size[1] * len(self.where.names), self.size[0])


def modules_of(config: Mapping[str, Any]) -> Iterator[Module]:
    """The projections of a model, by its config in the Hugging Face spelling."""
    family, spec = families.build_spec(config)
    names = family.names(spec)
    infos = file_infos(spec, config, names, torch.float32)
    for name, place in projection_places(names).items():
        shape = infos[place.file].shape
        if len(shape) == 2:
            where = layout(paddle_family(config), place.file, 2)
            rows, columns = where.piece_shape(shape)
            yield Module(name, where, (rows, columns), place.view is transposed)


def require_all_placed(left: Iterable[str], found: Mapping[str, Tensor], src: Path) -> None:
    """Refuse files with tensors that no module has taken, or with none at all.

    Raises:
        CheckpointError: which one.
    """
    odd = sorted(left)
    if odd or not found:
        what = f"tensor {odd[0]} has no place in the base model" if odd else "no tensors of the adapter's method"
        raise CheckpointError(what, where=str(src), fix="use the adapter's own base model")


def write_peft(
    dst: Path,
    tensors: Mapping[str, Tensor],
    modules: list[Module],
    config: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> None:
    """An adapter in PEFT's layout.

    Args:
        modules: those it sits on.
        config: the base's.
        settings: the method's part of the config, and what it says in place of the common part.
    """
    common = {
        "task_type": "CAUSAL_LM",
        "fan_in_fan_out": any(module.conv1d for module in modules),
        "inference_mode": True,
        "target_modules": shortest_names([m.name for m in modules], [m.name for m in modules_of(config)]),
    }
    write_files(dst, tensors, {CONFIG: {**common, **settings}}, WEIGHTS, "pt")


def write_paddle(
    dst: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    file: str,
    settings: tuple[str, Mapping[str, Any]],
) -> None:
    """An adapter in PaddleNLP's layout, with the base's config beside it.

    Args:
        file: of the weights.
        settings: file of the method's config, and what it says beside the targets.
    """
    leaves = sorted({name.rsplit(".", 2)[-2] for name in tensors})
    dtype = DTYPE_NAMES[next(iter(tensors.values())).dtype]
    common = {
        "target_modules": [f".*{leaf}.*" for leaf in leaves],
        "tensor_parallel_degree": -1,
        "dtype": dtype,
    }
    name, own = settings
    texts = {name: {**own, **common}, "config.json": to_paddle_config(config, dtype)}
    write_files(dst, tensors, texts, file, "np")


def write_files(
    dst: Path, tensors: Mapping[str, Tensor], texts: Mapping[str, Mapping[str, Any]], file: str, kind: str
) -> None:
    """Configs and weights, read back before they appear."""
    infos = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    digests = Digests()
    with atomic_directory(dst) as folder:
        for name, settings in texts.items():
            atomic_write_text(folder / name, json.dumps(settings, indent=2) + "\n")
        pickled = file.endswith(".pdparams")
        path = folder / file
        with PdparamsWriter(path, infos) if pickled else SafetensorsWriter(path, infos, metadata={"format": kind}) as w:
            for name, tensor in tensors.items():
                digests.add(name, tensor)
                w.write(name, tensor)
        written: TensorSource = (
            Ranks.open(folder, file.removesuffix(".pdparams"), ()).only if pickled else SafetensorsSource(path)
        )
        with written:
            compare(written, digests, sum(info.num_bytes for info in infos.values()))
