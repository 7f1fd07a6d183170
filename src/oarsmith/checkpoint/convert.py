"""A model directory from one layout into another, tensor by tensor; no decoder is built.

What will be written is planned from headers: every tensor of the source must belong to the model its config describes,
in the right shape, or nothing is written. While tensors stream through, their hashes are taken; `verify` reads the
result back and compares before the directory appears under its name.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from oarsmith.atomic import atomic_directory, atomic_write_text
from oarsmith.checkpoint.files import require_inside
from oarsmith.checkpoint.fill import check_copies, check_tensor, file_infos, match_names
from oarsmith.checkpoint.paddle.config import to_paddle_config
from oarsmith.checkpoint.paddle.names import is_head, layout, paddle_family
from oarsmith.checkpoint.paddle.pdparams import PdparamsWriter
from oarsmith.checkpoint.safetensors_stream import MAX_SHARD_BYTES, ShardedSafetensorsWriter, TensorInfo
from oarsmith.checkpoint.source import TensorSource, open_model
from oarsmith.checkpoint.tensors import FLOATS
from oarsmith.checkpoint.torch_bin_write import ShardedTorchBinWriter
from oarsmith.checkpoint.verify import Digests, check_written
from oarsmith.errors import CheckpointError
from oarsmith.models import families
from oarsmith.models.families import scoring

Target = Literal["hf", "bin", "paddle", "pdparams"]
Progress = Callable[[str, int, int], None]
DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_SIDE_FILES = (
    "generation_config.json",
    "tokenizer*",
    "*.model",
    "*.tiktoken",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "LICENSE*",
)


class TensorWriter(Protocol):
    """Takes tensors in the order they were declared."""

    def write(self, name: str, tensor: Tensor) -> None: ...


@dataclass(frozen=True)
class Output:
    """Tensors to write that come from one tensor of the source: names with dtype and shape, and how to make them."""

    source: str
    tensors: Mapping[str, TensorInfo]
    make: Callable[[Tensor], Iterable[Tensor]]


@dataclass(frozen=True)
class Report:
    """What a conversion wrote: tensors, parameters and bytes."""

    num_tensors: int
    num_parameters: int
    num_bytes: int


def changes_values(config: Mapping[str, Any], to: Target, dtype: torch.dtype | None) -> bool:
    """Whether the written weights are rounded: a cast, or a head whose rows get unit length."""
    divided = to in ("paddle", "pdparams") and families.build_spec(config)[1].head.normalized
    return dtype is not None or divided


def convert_directory(
    src: Path,
    dst: Path,
    to: Target,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
    check: Callable[[Path], None] | None = None,
) -> Report:
    """Write the model directory ``dst`` from ``src``. It appears complete and verified, or not at all.

    Args:
        to: ``hf`` is safetensors, ``bin`` PyTorch's own format, ``paddle`` PaddleNLP's safetensors, ``pdparams`` its
            pickles.
        dtype: of the written floats; None keeps each tensor's own.
        progress: called with (what is being done, bytes done, bytes in all).
        check: a last look at the written directory before it appears; raises to refuse it.

    Raises:
        OarsmithError: a damaged or hostile source, a family that ``to`` has no layout for, disk full, or a file that
            does not read back as it was written.
    """
    config, opened = open_model(src)
    with opened as source:
        if to in ("paddle", "pdparams"):
            scoring.require_text(config, "PaddleNLP's layout of scores is not documented")
        outputs = _plan(config, source, to, dtype)
        tensors = {name: info for output in outputs for name, info in output.tensors.items()}
        total = sum(info.num_bytes for info in tensors.values())
        with atomic_directory(dst, num_bytes=total) as folder:
            _write_config(folder, config, dtype or source.stored_dtype(), to, changed=dtype is not None)
            copy_side_files(src, folder)
            with open_writer(folder, tensors, to, max_shard_bytes) as writer:
                digests = stream(source, outputs, writer, total, progress)
            check_written(folder, digests, total, progress)
            if check is not None:
                check(folder)
    return Report(len(tensors), sum(math.prod(info.shape) for info in tensors.values()), total)


def _plan(config: Mapping[str, Any], source: TensorSource, to: Target, dtype: torch.dtype | None) -> list[Output]:
    """Every tensor to write, in the order of the family's files."""
    family, spec = families.build_spec(config)
    names = family.names(spec)
    file_names = match_names(names, source)
    check_copies(names, file_names, source)
    expected = file_infos(spec, config, names, dtype or source.stored_dtype())
    outputs = []
    for place in names.places:
        actual = file_names[place.file]
        check_tensor(source, actual, expected[place.file].shape)
        # Parameters that must stay float32 do, whatever the model is cast to.
        kept = FLOATS[source.dtypes[actual]] if source.dtypes[actual] != "F64" else torch.float64
        info = TensorInfo(kept if dtype is None else expected[place.file].dtype, expected[place.file].shape)
        if to in ("hf", "bin"):
            outputs.append(Output(actual, {actual: info}, lambda tensor: (tensor,)))
        elif is_head(place.file) and paddle_family(config).tied_head:
            _require_tied(source, actual, file_names[names.places[0].file])
        else:
            unit_rows = spec.head.normalized and is_head(place.file)
            outputs.append(_paddle_output(config, place.file, actual, info, unit_rows=unit_rows))
    return outputs


def _require_tied(source: TensorSource, head: str, table: str) -> None:
    """PaddleNLP has one matrix for both: a head that is another one would be lost."""
    if not torch.equal(source.read(head), source.read(table)):
        raise CheckpointError(
            f"{head} is not the embedding table, but PaddleNLP ties the two",
            where=str(source.directory),
            fix="keep this model in the Hugging Face or bin layout",
        )


def _paddle_output(config: Mapping[str, Any], name: str, actual: str, info: TensorInfo, *, unit_rows: bool) -> Output:
    """``unit_rows``: PaddleNLP does not divide the head's rows by their length, so they are written divided."""
    where = layout(paddle_family(config), name, len(info.shape))
    piece = TensorInfo(info.dtype, where.piece_shape(info.shape))

    def make(tensor: Tensor) -> tuple[Tensor, ...]:
        return where.split(functional.normalize(tensor.float()).to(info.dtype) if unit_rows else tensor)

    return Output(actual, dict.fromkeys(where.names, piece), make)


def open_writer(
    folder: Path, tensors: Mapping[str, TensorInfo], to: Target, max_shard_bytes: int = MAX_SHARD_BYTES
) -> AbstractContextManager[TensorWriter]:
    """The writer of a layout, for an existing directory."""
    match to:
        case "hf":
            return ShardedSafetensorsWriter(folder, tensors, max_shard_bytes=max_shard_bytes)
        case "paddle":
            return ShardedSafetensorsWriter(folder, tensors, max_shard_bytes=max_shard_bytes, metadata={"format": "np"})
        case "bin":
            return ShardedTorchBinWriter(folder, tensors, max_shard_bytes=max_shard_bytes)
        case "pdparams":
            return PdparamsWriter(folder / "model_state.pdparams", tensors)


def stream(
    source: TensorSource,
    outputs: Iterable[Output],
    writer: TensorWriter,
    total: int,
    progress: Progress | None,
) -> Digests:
    """Read, change, hash and write, one tensor of the source after the other."""
    digests, done = Digests(), 0
    for output in outputs:
        made = output.make(source.read(output.source))
        for (name, info), tensor in zip(output.tensors.items(), made, strict=True):
            ready = tensor.reshape(info.shape).to(info.dtype).contiguous()
            digests.add(name, ready)
            writer.write(name, ready)
            done += info.num_bytes
        if progress is not None:
            progress("writing", done, total)
    return digests


def _write_config(folder: Path, config: Mapping[str, Any], dtype: torch.dtype, to: Target, *, changed: bool) -> None:
    name = DTYPE_NAMES[dtype]
    if to in ("paddle", "pdparams"):
        written = to_paddle_config(config, name)
    else:
        key = "dtype" if "dtype" in config else "torch_dtype"
        written = {**config, key: name} if changed or key in config else dict(config)
    atomic_write_text(folder / "config.json", json.dumps(written, indent=2) + "\n")


def copy_side_files(src: Path, dst: Path) -> None:
    """Tokenizer, generation config, templates and licence; never code.

    Raises:
        CheckpointError: one of them is a link that leads out of ``src``.
    """
    for pattern in _SIDE_FILES:
        for path in sorted(src.glob(pattern)):
            if path.is_file() and not path.name.endswith((".py", ".bin", ".safetensors", ".pdparams")):
                shutil.copyfile(require_inside(src, path), dst / path.name)


def require_known_target(to: str, config: Mapping[str, Any]) -> None:
    """Refuse before anything is read: PaddleNLP does not have every family."""
    if to in ("paddle", "pdparams"):
        paddle_family(config)
    elif to not in ("hf", "bin"):
        raise CheckpointError(f"unknown layout {to!r}", fix="use hf, bin, paddle or pdparams")
