"""GGUF, which llama.cpp reads. Its grids are its own: weights are written as floats first, and encoded from those."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from oarsmith.atomic import atomic_write_text, temporary_directory
from oarsmith.checkpoint.gguf.write import GgufReport, require_target, write_gguf
from oarsmith.checkpoint.safetensors_stream import ShardedSafetensorsWriter
from oarsmith.errors import ModelError
from oarsmith.quantize.grid import Quantized
from oarsmith.quantize.layouts.base import PartWriter
from oarsmith.quantize.layouts.contents import Contents, dense_tensor


class GgufLayoutWriter(PartWriter):
    """Takes a model's tensors as every `LayoutWriter` does, quantized ones as the floats they stand for.

    Attributes:
        folder: the float model grows here; what `write_gguf` looks for beside it (the tokenizer's files) goes here.
        importance: to be filled: by the maps' tensors in the files (``X.weight``), how much each input counts [I].
        report: what was written, after the block.
    """

    def __init__(self, contents: Contents, folder: Path) -> None:
        self.contents, self.folder = contents, folder
        self.importance: dict[str, Tensor] = {}
        self.report: GgufReport | None = None
        wide = {one.tensor for one in contents.maps.values()}
        # Numbers on a grid of 32 are found again exactly, as long as they are not rounded in between.
        self._infos = {
            name: replace(info, dtype=torch.float32) if name in wide else info for name, info in contents.floats.items()
        }
        self.files = ShardedSafetensorsWriter(folder, self._infos)

    def plain(self, name: str, tensor: Tensor) -> None:
        info = self._infos[name]
        self.files.write(name, tensor.to(info.dtype).reshape(info.shape).contiguous())

    def map(self, stem: str, quantized: Sequence[Quantized], input_scale: Tensor | None = None) -> None:
        assert input_scale is None, stem
        one = self.contents.maps[stem]
        self.plain(one.tensor, dense_tensor(one.place, quantized))

    def cache(self, layer: int, key_scale_H: Tensor, value_scale_H: Tensor) -> None:
        raise AssertionError("GGUF has no place for caches, which open_gguf refuses")


@contextmanager
def open_gguf(
    contents: Contents, dst: Path, *, type: str, overwrite: bool = False, with_tokenizer: bool = True
) -> Iterator[GgufLayoutWriter]:
    """The writer of a file that appears complete at the end of the block, or not at all.

    Args:
        type, overwrite, with_tokenizer: as `write_gguf` has them.

    Raises:
        ModelError: inputs or caches are to be rounded, which llama.cpp decides by itself.
        CheckpointError: as `write_gguf`.
    """
    rounded = [one.stem for one in contents.maps.values() if one.scheme.activations is not None]
    if rounded or contents.scheme.cache is not None:
        raise ModelError(
            "gguf files have no place for how inputs and caches are rounded",
            where=rounded[0] if rounded else "cache",
            fix="use compressed-tensors",
        )
    require_target(dst, type, overwrite=overwrite)
    with temporary_directory(dst) as hidden:
        folder = hidden / dst.stem  # the model's name in the file
        folder.mkdir()
        writer = GgufLayoutWriter(contents, folder)
        with writer.files:
            yield writer
        atomic_write_text(folder / "config.json", json.dumps(contents.config, indent=2) + "\n")
        writer.report = write_gguf(
            folder,
            dst,
            type=type,
            overwrite=overwrite,
            with_tokenizer=with_tokenizer,
            importance=writer.importance,
        )
