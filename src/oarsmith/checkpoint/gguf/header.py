"""The header of a GGUF file: metadata, and where tensors lie, checked before anything trusts them.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The package's own reader slices a memory map without
looking at its end, so a cut or hostile file gives an IndexError or a loop of 2**64 steps; it also takes 3 s for a
vocabulary of 49k (this one: 0.1 s).
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from oarsmith.checkpoint.files import REFETCH
from oarsmith.checkpoint.gguf.cursor import Cursor, check_version
from oarsmith.errors import CheckpointError

_MAX_DIMS = 4


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies. `shape` is in row-major order (GGUF stores it reversed)."""

    path: Path
    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    start: int
    num_bytes: int


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    """Metadata and tensors (in file order) of one file.

    Raises:
        CheckpointError: not a GGUF file, a version this reader does not know, big-endian, truncated, or inconsistent;
            the message names what was expected and what is there.
    """
    if not path.is_file():
        raise CheckpointError("no such file", where=str(path), fix="check the path")
    size = path.stat().st_size
    if size < 24:
        raise CheckpointError(f"a GGUF file has at least 24 bytes, this one {size}", where=str(path), fix=REFETCH)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = Cursor(path, data)
        check_version(cursor)
        num_tensors = cursor.u64("the tensor count")
        metadata = _read_metadata(cursor, cursor.u64("the metadata count"))
        return metadata, _read_tensors(cursor, num_tensors, metadata)


def _read_metadata(cursor: Cursor, count: int) -> dict[str, Any]:
    cursor.require(count * 13, f"metadata of {count:,} keys")
    metadata: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.string("a metadata key")
        if key in metadata:
            raise CheckpointError(f"the metadata key {key!r} occurs twice", where=str(cursor.path), fix=REFETCH)
        metadata[key] = cursor.value(cursor.value_type(key), key)
    return metadata


def _read_tensors(cursor: Cursor, count: int, metadata: Mapping[str, Any]) -> dict[str, GgufTensor]:
    cursor.require(count * 24, f"a list of {count:,} tensors")
    found = [_read_tensor_info(cursor) for _ in range(count)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise CheckpointError(f"general.alignment {alignment!r} is not a power of two", where=str(cursor.path))
    data_start = -(-cursor.offset // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    end = data_start
    for tensor in sorted(found, key=lambda item: item.start):
        placed = replace(tensor, start=data_start + tensor.start)
        where = f"{cursor.path}: {tensor.name}"
        if tensor.name in tensors:
            raise CheckpointError("the tensor occurs twice", where=where, fix=REFETCH)
        if placed.start < end or tensor.start % alignment:
            raise CheckpointError("the tensor's data overlaps another's or is not aligned", where=where, fix=REFETCH)
        end = placed.start + placed.num_bytes
        tensors[tensor.name] = placed
    if tensors and end > len(cursor.data):  # a file of metadata alone may end before the alignment
        raise CheckpointError(
            f"the file is truncated: {len(tensors)} tensors need {end:,} bytes, the file has {len(cursor.data):,}",
            where=str(cursor.path),
            fix=REFETCH,
        )
    return {tensor.name: tensors[tensor.name] for tensor in found}


def _read_tensor_info(cursor: Cursor) -> GgufTensor:
    """`start` is still relative to the data section, whose place is known only after the last entry."""
    name = cursor.string("a tensor name")
    where = f"{cursor.path}: {name}"
    num_dims = cursor.u32(name)
    if not 1 <= num_dims <= _MAX_DIMS:
        raise CheckpointError(f"the tensor has {num_dims} dimensions, 1 to {_MAX_DIMS} are possible", where=where)
    shape = tuple(reversed([cursor.u64(name) for _ in range(num_dims)]))
    number = cursor.u32(name)
    start = cursor.u64(name)
    if number not in GGMLQuantizationType.__members__.values():
        raise CheckpointError(
            f"tensor type {number} is not known to the installed gguf package",
            where=where,
            fix="pip install --upgrade gguf, or quantize the model to a common type such as Q8_0",
        )
    kind = GGMLQuantizationType(number)
    block_elements, block_bytes = GGML_QUANT_SIZES[kind]
    if 0 in shape or shape[-1] % block_elements:
        raise CheckpointError(f"shape {shape} does not fill {kind.name} blocks of {block_elements}", where=where)
    return GgufTensor(cursor.path, name, shape, kind, start, math.prod(shape) // block_elements * block_bytes)
