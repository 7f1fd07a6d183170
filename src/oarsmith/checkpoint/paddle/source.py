"""A PaddleNLP directory under Hugging Face names: transposed, split, fused and sharded tensors put together.

Files: ``model_state.pdparams``, shards ``model_state-00001-of-00002.pdparams``, ``model_state.tp00_pp01.pdparams``
of tensor and pipeline parallelism, or the unified layout (safetensors whose metadata say ``{"format": "np"}``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from oarsmith.checkpoint.files import read_shards
from oarsmith.checkpoint.paddle.names import QKV, Layout, group_sizes, is_head, layout, paddle_family
from oarsmith.checkpoint.paddle.ranks import Ranks, pickled_files
from oarsmith.checkpoint.safetensors_source import INDEX, SINGLE
from oarsmith.checkpoint.safetensors_stream import safetensors_metadata
from oarsmith.checkpoint.tensors import TensorSource

_STEM = "model_state"
_GATE_UP = ("gate_proj", "up_proj")
# Buffers and second copies of tied heads that PaddleNLP's state dicts may carry.
_NO_WEIGHTS = re.compile(
    r".*(rotary_emb|rotary_pos_emb|rotary_embeddings)\..*|lm_head\.(decoder\.weight|decoder_weight)"
)


def is_paddle(directory: Path) -> bool:
    """Whether the weights of a directory are PaddleNLP's."""
    if (directory / INDEX).is_file():
        return _says_np(directory / next(iter(read_shards(directory / INDEX))))
    if (directory / SINGLE).is_file():
        return _says_np(directory / SINGLE)
    return directory.is_dir() and bool(pickled_files(directory, _STEM))


def _says_np(path: Path) -> bool:
    return safetensors_metadata(path).get("format") == "np"


def open_paddle_files(directory: Path) -> Ranks:
    """The files of a PaddleNLP model directory as they are."""
    return Ranks.open(directory, _STEM, (INDEX, SINGLE))


class PaddleSource(TensorSource):
    """The tensors of PaddleNLP's files as Hugging Face ones.

    Args:
        ranks: the files.
        config: the Hugging Face config.
        shapes: shape of every tensor of the model by Hugging Face name, from its config.
    """

    def __init__(self, ranks: Ranks, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.directory, self._ranks, self._config = ranks.directory, ranks, config
        self._family = paddle_family(config)
        self._reads: dict[str, Callable[[], Tensor]] = {}
        self.shapes, self.dtypes = {}, {}
        left = set(ranks.shapes)
        for name, shape in shapes.items():
            left -= self._place(name, shape)
        tied = self._family.tied_head or config.get("tie_word_embeddings")
        for name in left:  # what no tensor of the model is made of is shown as it is, for the error that names it
            if not _NO_WEIGHTS.fullmatch(name) and not (is_head(name) and tied):
                self.shapes[name], self.dtypes[name] = ranks.shapes[name], ranks.dtypes[name]

    def _place(self, name: str, shape: tuple[int, ...]) -> set[str]:
        """Find out how a Hugging Face tensor is read, and from which files' tensors; leave it out if they lack any."""
        where = layout(self._family, name, len(shape))
        if is_head(name) and self._family.tied_head:  # PaddleNLP has one matrix where Hugging Face may have two
            tables = [other for other in self._ranks.shapes if other.endswith("word_embeddings.weight")]
            where = Layout(tuple(tables[:1]), False)
        held = [next((n for n in (part, _fused(part)) if n in self._ranks.shapes), None) for part in where.names]
        if not held or None in held:
            return set()
        piece = where.piece_shape(shape)
        parts = list(zip(where.names, [found for found in held if found is not None], strict=True))
        for part, found in parts:  # before anyone takes memory for a shape that only the config knows
            if part == found:
                self._ranks.split_axis(found, piece)
            elif (*self._ranks.shapes[found][:-1], self._part_width(found, part)) != piece:
                raise self._ranks.misfit(found, piece)
        self.shapes[name], self.dtypes[name] = shape, self._ranks.dtypes[parts[0][1]]
        self._reads[name] = lambda: where.join([self._piece(part, found, piece) for part, found in parts])
        return {found for _, found in parts}

    def _piece(self, name: str, held: str, shape: tuple[int, ...]) -> Tensor:
        if name == held:
            return self._ranks.read(name, shape, group_sizes(self._family, name, shape[-1:], self._config))
        return self._from_fused(held, name)

    def _columns(self, fused: str) -> int:
        return self._ranks.shapes[fused][-1] * self._ranks.count

    def _head_groups(self, fused: str) -> tuple[int, int, int]:
        """Key heads, query heads for each of them, and the size of a head."""
        heads = int(self._config["num_attention_heads"])
        groups = int(self._config.get("num_key_value_heads") or heads)
        per_group = heads // groups
        return groups, per_group, self._columns(fused) // (groups * (per_group + 2))

    def _part_width(self, fused: str, name: str) -> int:
        module = name.split(".")[-2]
        if module in _GATE_UP:
            return self._columns(fused) // 2
        groups, per_group, dim = self._head_groups(fused)
        return groups * dim * (per_group if module == QKV[0] else 1)

    def _from_fused(self, fused: str, name: str) -> Tensor:
        """q, k, v lie head group by head group (its queries, its key, its value); gate and up one after the other."""
        columns, module = self._columns(fused), name.split(".")[-2]
        shape = (*self._ranks.shapes[fused][:-1], columns)
        whole = self._ranks.read(fused, shape, group_sizes(self._family, fused, (columns,), self._config))
        if module in _GATE_UP:
            return whole.chunk(2, dim=-1)[_GATE_UP.index(module)].contiguous()
        groups, per_group, dim = self._head_groups(fused)
        if dim * groups * (per_group + 2) != columns:
            raise self._ranks.misfit(fused, shape)
        parts = whole.unflatten(-1, (groups, -1)).split((per_group * dim, dim, dim), dim=-1)
        return parts[QKV.index(module)].flatten(-2).contiguous()

    def read(self, name: str) -> Tensor:
        return self._reads[name]()

    def close(self) -> None:
        self._ranks.close()


def _fused(name: str) -> str | None:
    """The tensor that holds this one where PaddleNLP was told to fuse."""
    module = name.split(".")[-2] if "." in name else ""
    if module in QKV:
        return name.replace(module, "qkv_proj")
    return name.replace(module, "gate_up_fused_proj") if module in _GATE_UP else None
