"""A file beside an adapter's, for tensors that PEFT's file cannot hold and training goes on from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from oarsmith.checkpoint.safetensors_source import SafetensorsSource
from oarsmith.checkpoint.safetensors_stream import SafetensorsWriter, TensorInfo
from oarsmith.checkpoint.tensors import FLOATS
from oarsmith.errors import CheckpointError

EXACT = "adapter_exact.safetensors"

Tensors = Mapping[str, Mapping[str, Tensor]]
"""By a projection's name and the tensor's."""


def write_exact(directory: Path, tensors: Tensors) -> None:
    """Write them where there are any."""
    flat = {f"{name}.{what}": tensor.detach() for name, own in tensors.items() for what, tensor in own.items()}
    if flat:
        infos = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in flat.items()}
        with SafetensorsWriter(directory / EXACT, infos, metadata={"format": "pt"}) as writer:
            for name, tensor in flat.items():
                writer.write(name, tensor)


def read_exact(directory: Path, wanted: Tensors) -> dict[str, dict[str, Tensor]]:
    """What a file holds of tensors of these shapes; nothing where there is no file.

    Raises:
        CheckpointError: a missing or misshapen tensor (named), or a damaged file.
    """
    path = directory / EXACT
    if not any(wanted.values()) or not path.is_file():
        return {}
    found: dict[str, dict[str, Tensor]] = {}
    with SafetensorsSource(path) as source:
        for name, own in wanted.items():
            for what, tensor in own.items():
                key = f"{name}.{what}"
                if source.shapes.get(key) != tuple(tensor.shape) or source.dtypes[key] not in FLOATS:
                    raise CheckpointError(
                        f"tensor {key} is missing or not of shape {tuple(tensor.shape)}",
                        where=str(path),
                        fix="remove this file: without it the adapter is the same, but training begins anew from it",
                    )
                found.setdefault(name, {})[what] = source.read(key)
    return found
