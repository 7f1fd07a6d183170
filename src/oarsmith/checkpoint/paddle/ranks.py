"""PaddleNLP's files as they are: one source a rank of tensor parallelism, and tensors put together from the ranks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from oarsmith.checkpoint.files import read_shards
from oarsmith.checkpoint.paddle.pdparams import PdparamsSource
from oarsmith.checkpoint.safetensors_source import SafetensorsSource
from oarsmith.checkpoint.tensors import TensorSource
from oarsmith.errors import CheckpointError

_RANK = r"(-\d+-of-\d+)?(\.tp(?P<tp>\d+))?([._]pp\d+)?\.pdparams"


def pickled_files(directory: Path, stem: str) -> dict[int, list[Path]]:
    """Rank of tensor parallelism -> the ``.pdparams`` files that together hold its tensors."""
    index = directory / f"{stem}.pdparams.index.json"
    if index.is_file():
        return {0: [directory / file for file in read_shards(index)]}
    ranks: dict[int, list[Path]] = {}
    for path in sorted(directory.iterdir()):
        match = re.fullmatch(re.escape(stem) + _RANK, path.name)
        if match is not None:
            ranks.setdefault(int(match["tp"] or 0), []).append(path)
    return ranks


class Ranks:
    """The same tensors on every rank of tensor parallelism, each rank with its shard or a copy.

    Args:
        sources: by rank, under PaddleNLP's names.

    Raises:
        CheckpointError: the ranks hold different tensors.
    """

    def __init__(self, directory: Path, sources: Sequence[TensorSource]) -> None:
        self.directory, self._sources = directory, sources
        self.shapes = sources[0].shapes
        self.dtypes = {name: "BF16" if code == "U16" else code for name, code in sources[0].dtypes.items()}
        for source in sources[1:]:
            odd = sorted(set(source.shapes) ^ set(self.shapes))
            if odd:
                raise CheckpointError(f"tensor {odd[0]} is not in the files of all ranks", where=str(directory))

    @classmethod
    def open(cls, directory: Path, stem: str, safetensors: Sequence[str]) -> Ranks:
        """The first of the ``safetensors`` files that is there, else the pickled ones of a stem.

        Raises:
            CheckpointError: no files, damaged ones, or missing ranks.
        """
        for name in safetensors:
            if (directory / name).is_file():
                return cls(directory, [SafetensorsSource(directory / name)])
        files = pickled_files(directory, stem)
        if not files or sorted(files) != list(range(len(files))):
            raise CheckpointError(
                f"files of ranks {sorted(files)} are there, others are missing",
                where=str(directory),
                fix="copy the files of all ranks into one directory",
            )
        return cls(directory, [PdparamsSource(files[rank]) for rank in sorted(files)])

    @property
    def only(self) -> TensorSource:
        """The one source of files that are not sharded by rank."""
        assert len(self._sources) == 1
        return self._sources[0]

    @property
    def count(self) -> int:
        return len(self._sources)

    def read(self, name: str, shape: tuple[int, ...], sizes: Sequence[int]) -> Tensor:
        """The whole tensor of a known shape.

        Args:
            sizes: widths of the fused parts in the whole's last axis; a rank has a piece of each, side by side.

        Raises:
            CheckpointError: the shards do not make up the shape.
        """
        axis = self.split_axis(name, shape)
        if axis is None:
            return self._one(0, name)
        shards = [self._one(rank, name) for rank in range(self.count)]
        if axis != len(shape) - 1:
            return torch.cat(shards, dim=axis)
        if any(size % self.count for size in sizes) or sum(sizes) != shape[-1]:
            raise self.misfit(name, shape)
        split = [shard.split([size // self.count for size in sizes], dim=-1) for shard in shards]
        return torch.cat([parts[i] for i in range(len(sizes)) for parts in split], dim=-1)

    def split_axis(self, name: str, shape: tuple[int, ...]) -> int | None:
        """The axis along which the ranks share a tensor of this shape; None where each has all of it.

        Raises:
            CheckpointError: the shards do not make up the shape.
        """
        local = self.shapes[name]
        if any(source.shapes[name] != local for source in self._sources) or len(local) != len(shape):
            raise self.misfit(name, shape)
        axes = [i for i in range(len(shape)) if local[i] != shape[i]]
        if not axes:
            return None
        if len(axes) != 1 or local[axes[0]] * self.count != shape[axes[0]]:
            raise self.misfit(name, shape)
        return axes[0]

    def misfit(self, name: str, shape: tuple[int, ...]) -> CheckpointError:
        return CheckpointError(
            f"{self.count} ranks hold {self.shapes[name]} each, the config asks for {shape} in all",
            where=f"{self.directory}: {name}",
            fix="config.json and weights do not belong together; copy both from the same model",
        )

    def _one(self, rank: int, name: str) -> Tensor:
        tensor = self._sources[rank].read(name)
        return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor

    def close(self) -> None:
        for source in self._sources:
            source.close()
