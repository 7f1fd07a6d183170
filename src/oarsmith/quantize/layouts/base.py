"""What layouts share: one description of each, and one writer that streams a model into it.

Shapes: O out, I in features, G groups of a row, H heads of keys.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from oarsmith.atomic import atomic_directory, atomic_write_text
from oarsmith.checkpoint.convert import DTYPE_NAMES
from oarsmith.checkpoint.safetensors_stream import MAX_SHARD_BYTES, ShardedSafetensorsWriter, TensorInfo
from oarsmith.errors import CheckpointError, ModelError
from oarsmith.quantize.grid import Quantized
from oarsmith.quantize.layouts.contents import Contents, FileMap, file_parts


class LayoutWriter(Protocol):
    """Takes a model's tensors in any order, each once, and holds none of them longer than it takes to write it.

    Attributes:
        folder: where the files grow; what lies there too (a tokenizer, a report) appears with them.
        contents: what it was told that would come.
    """

    folder: Path
    contents: Contents

    def plain(self, name: str, tensor: Tensor) -> None:
        """A tensor that stays in floats, by its name in the files and with the file's axes."""

    def map(self, stem: str, quantized: Sequence[Quantized], input_scale: Tensor | None = None) -> None:
        """A quantized map of the files.

        Args:
            quantized: its weight [O, I] whatever the file's axes are; of a tensor of all experts, each expert's.
            input_scale: one number, where inputs have a static scale.
        """

    def cache(self, layer: int, key_scale_H: Tensor, value_scale_H: Tensor) -> None:
        """Static scales of a layer's keys and values: one, or one for each head."""

    def parameter(self, name: str, tensor: Tensor) -> None:
        """A parameter of the decoder that stays in floats, as all of the file's tensors that it is made of."""

    def weight(self, path: str, quantized: Sequence[Quantized], input_scale: Tensor | None = None) -> None:
        """A linear map of the decoder (``layers.0.attention.qkv``), fused or stacked, as all of the file's maps.

        Args:
            quantized: the weight [O, I]; of stacked maps, each expert's.
            input_scale: as in `map`.
        """


class Layout(ABC):
    """A layout, for the files of one model.

    Attributes:
        name: what users call it.
        elsewhere: the layout to name in an error where this one has no place for what is asked.
        metadata: strings in the header of each file of weights.
    """

    name: str
    elsewhere: str = "compressed-tensors"
    metadata: Mapping[str, str] = {"format": "pt"}

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What the files hold scales in, for a model whose floats have this dtype."""
        return dtype

    @abstractmethod
    def check(self, contents: Contents) -> None:
        """Refuse what the layout cannot hold.

        Raises:
            ModelError: it names a layout that can, where there is one.
        """

    @abstractmethod
    def infos(self, one: FileMap, dtype: torch.dtype) -> Mapping[str, TensorInfo]:
        """Names, dtypes and shapes of a map's tensors."""

    @abstractmethod
    def tensors(self, one: FileMap, quantized: Quantized, input_scale: Tensor | None) -> Mapping[str, Tensor]:
        """A map's tensors; scales may still be in fp32."""

    @abstractmethod
    def config(self, contents: Contents) -> dict[str, Any]:
        """What ``config.json`` says of the quantization."""

    def cache_infos(self, attention: str, dtype: torch.dtype, num_scales: int) -> Mapping[str, TensorInfo]:
        """Names, dtypes and shapes of the scales of a layer's keys and values."""
        raise AssertionError(f"{self.name} has no place for caches, which check() refuses")

    def cache_tensors(self, attention: str, key_scale_H: Tensor, value_scale_H: Tensor) -> Mapping[str, Tensor]:
        """The scales themselves."""
        raise AssertionError(f"{self.name} has no place for caches, which check() refuses")

    def float_infos(self, name: str, info: TensorInfo) -> Mapping[str, TensorInfo]:
        """What a tensor that stays in floats is written as."""
        return {name: info}

    def float_tensors(self, name: str, tensor: Tensor) -> Mapping[str, Tensor]:
        """The same, the tensors themselves."""
        return {name: tensor}

    def model_config(self, contents: Contents) -> dict[str, Any]:
        """``config.json`` but for the quantization."""
        key = "dtype" if "dtype" in contents.config else "torch_dtype"
        return {**contents.config, key: DTYPE_NAMES[contents.dtype]}

    def side_files(self, contents: Contents) -> Mapping[str, str]:
        """Further files beside the weights, by name."""
        return {}

    def refused(self, what: str, where: str, fix: str | None = None) -> ModelError:
        """An error about something that has no place."""
        return ModelError(
            f"{self.name} files have no place for {what}", where=where, fix=fix or f"use {self.elsewhere}"
        )


def require_rows(layout: Layout, contents: Contents) -> None:
    """Refuse maps whose weights the family's files do not hold as [O, I]: readers of the layout replace linear modules.

    Raises:
        ModelError: there is one.
    """
    for one in contents.maps.values():
        if one.stored != "rows":
            how = "transposed ([in, out])" if one.stored == "columns" else "with those of all experts in one tensor"
            fix = "use gguf" + (", or paddle" if one.stored == "columns" else ", or leave these maps in floats")
            raise layout.refused(f"a weight that the model's files hold {how}", one.tensor, fix)


def require_weight_only(layout: Layout, contents: Contents) -> None:
    """Refuse all but integers whose rows have their own scales, beside inputs and caches that stay as they are.

    Raises:
        ModelError: something else is asked for.
    """
    for one in contents.maps.values():
        if one.grid.code != "int":
            raise layout.refused("numbers in E4M3", one.tensor, "use compressed-tensors")
        if one.grid.rows != 1:
            raise layout.refused("integers whose rows share scales", one.tensor, "give each row its own scales")
        if one.scheme.activations is not None:
            raise layout.refused("how inputs are rounded", one.tensor, "use compressed-tensors")
    if contents.scheme.cache is not None:
        raise layout.refused("scales of keys and values", "cache", "use compressed-tensors")


def require_whole_groups(layout: Layout, one: FileMap) -> None:
    """Every reader wants groups of one size.

    Raises:
        ModelError: the group size does not divide the in features.
    """
    group = one.grid.group_of(one.in_features)
    if one.in_features % group:
        raise ModelError(
            f"groups of {group} do not divide {one.in_features} in features, which {layout.name} files require",
            where=one.tensor,
            fix="choose a group size that divides them, or leave the map in floats",
        )


class PartWriter(ABC):
    """What every `LayoutWriter` does with parameters of the decoder: each is some tensors of the files."""

    contents: Contents

    @abstractmethod
    def plain(self, name: str, tensor: Tensor) -> None: ...

    @abstractmethod
    def map(self, stem: str, quantized: Sequence[Quantized], input_scale: Tensor | None = None) -> None: ...

    def parameter(self, name: str, tensor: Tensor) -> None:
        for place in self.contents.of_parameter(name):
            self.plain(place.file, place.view(tensor).detach())

    def weight(self, path: str, quantized: Sequence[Quantized], input_scale: Tensor | None = None) -> None:
        for place, parts in file_parts(self.contents.of_parameter(f"{path}.weight"), quantized):
            self.map(place.file.removesuffix(".weight"), parts, input_scale)


class StreamingWriter(PartWriter):
    """The writer of all layouts that are safetensors."""

    def __init__(self, layout: Layout, contents: Contents, folder: Path, max_shard_bytes: int) -> None:
        self.layout, self.contents, self.folder = layout, contents, folder
        infos: dict[str, TensorInfo] = {}
        by_tensor = {one.tensor: one for one in contents.maps.values()}
        for name, info in contents.floats.items():
            one = by_tensor.get(name)
            infos |= layout.float_infos(name, info) if one is None else layout.infos(one, contents.dtype)
        if contents.scheme.cache is not None:
            for attention, count in zip(contents.attentions, contents.num_scales, strict=True):
                infos |= layout.cache_infos(attention, contents.dtype, count)
        self._infos = infos
        self.files = ShardedSafetensorsWriter(folder, infos, max_shard_bytes=max_shard_bytes, metadata=layout.metadata)

    def write(self, name: str, tensor: Tensor) -> None:
        """One tensor in the dtype and shape that it was declared with.

        Raises:
            CheckpointError: a value that the dtype has no room for.
        """
        info = self._infos[name]
        ready = tensor.to(info.dtype).reshape(info.shape)
        if info.dtype.is_floating_point and info.dtype.itemsize > 1 and not bool(torch.isfinite(ready).all()):
            raise CheckpointError(f"a value is not a finite {DTYPE_NAMES[info.dtype]}", where=name)
        self.files.write(name, ready.contiguous())

    def plain(self, name: str, tensor: Tensor) -> None:
        for part, piece in self.layout.float_tensors(name, tensor).items():
            self.write(part, piece)

    def map(self, stem: str, quantized: Sequence[Quantized], input_scale: Tensor | None = None) -> None:
        one = self.contents.maps[stem]
        (weight,) = quantized
        assert tuple(weight.numbers_OI.shape) == (one.out_features, one.in_features), (stem, weight.numbers_OI.shape)
        assert weight.grid == one.grid, (stem, weight.grid, one.grid)
        for name, tensor in self.layout.tensors(one, weight, input_scale).items():
            self.write(name, tensor)

    def cache(self, layer: int, key_scale_H: Tensor, value_scale_H: Tensor) -> None:
        attention = self.contents.attentions[layer]
        for name, scale in self.layout.cache_tensors(attention, key_scale_H, value_scale_H).items():
            self.write(name, scale)


@contextmanager
def open_layout(
    layout: Layout,
    contents: Contents,
    directory: Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    check: Callable[[Path], None] | None = None,
) -> Iterator[LayoutWriter]:
    """The writer of a directory that appears complete at the end of the block, or not at all.

    Args:
        check: looks at the complete directory before it appears, and raises where it must not.

    Raises:
        CheckpointError: the disk is full, or a tensor was never written.
    """
    with atomic_directory(directory) as hidden:
        writer = StreamingWriter(layout, contents, hidden, max_shard_bytes)
        with writer.files:
            yield writer
        config = layout.model_config(contents) | {"quantization_config": layout.config(contents)}
        for name, text in {"config.json": _json(config), **layout.side_files(contents)}.items():
            atomic_write_text(hidden / name, text)
        if check is not None:
            check(hidden)


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"
