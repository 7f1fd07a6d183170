"""Which matrices a decoder's parameters hold: fused and stacked maps are several in one parameter.

Shapes: E experts, O rows, I columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from oarsmith.models.attention import Attention
from oarsmith.models.decoder import Decoder
from oarsmith.models.lfa import FilteredAttention, Tap
from oarsmith.models.linear import Linear
from oarsmith.models.mla import LatentAttention
from oarsmith.models.mlp import GatedFeedForward
from oarsmith.models.moe import Experts
from oarsmith.models.spec_parts import GQA


@dataclass(frozen=True, kw_only=True)
class RowBlocks:
    """The matrices in the rows of a parameter [..., O, I]: ``groups`` times over, runs of ``sizes`` rows.

    Matrix i is made of every i-th run. Leading axes (experts) are matrices side by side.
    """

    sizes: tuple[int, ...]
    groups: int = 1

    def split(self, tensor: Tensor) -> list[Tensor]:
        """[..., O, I] to each matrix [..., O_i, I]; views where ``groups`` is 1."""
        if len(self.sizes) == 1:
            return [tensor]
        return [part.flatten(-3, -2) for part in self._runs(tensor)]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of :meth:`split`."""
        if len(self.sizes) == 1:
            return parts[0]
        runs = [p.unflatten(-2, (self.groups, size)) for p, size in zip(parts, self.sizes, strict=True)]
        return torch.cat(runs, -2).flatten(-3, -2)

    def _runs(self, tensor: Tensor) -> Sequence[Tensor]:
        return tensor.unflatten(-2, (self.groups, sum(self.sizes))).split(self.sizes, -2)


def block_matrices(model: Decoder) -> dict[str, RowBlocks]:
    """Parameters of the decoder's blocks that are matrices (adapters' too), with what they hold.

    Not among them: embedding and head, norms, biases, routers (a router's rows are the output layer of a classifier).
    """
    found = {}
    for path, module in _parts(model):
        if isinstance(module, Tap):
            found[f"{path}.weight"] = RowBlocks(sizes=(module.weight.shape[-2],))
    fused = dict(_fused(model))
    for path, module in _parts(model):
        if not isinstance(module, Linear):
            continue
        for leaf, parameter in module.named_parameters():
            if leaf != "bias" and parameter.dim() > 1 and min(parameter.shape[-2:]) > 1:
                whole = RowBlocks(sizes=(parameter.shape[-2],))
                found[f"{path}.{leaf}"] = fused.get(path, whole) if leaf == "weight" else whole
    return found


def fused_matrices(model: Decoder) -> dict[str, RowBlocks]:
    """The parameters that hold several matrices."""
    return {name: blocks for name, blocks in block_matrices(model).items() if len(blocks.sizes) > 1}


def step_size_units(model: Decoder) -> dict[str, tuple[int, ...]]:
    """Runs of rows that share a step size in Adam-mini, where these are not single rows: heads of queries and keys."""
    found: dict[str, tuple[int, ...]] = {}
    for path, module in _parts(model):
        match module:
            case Attention(spec=spec):
                q, k, dim = spec.num_heads // spec.num_kv_heads, 1, spec.head_dim
                if spec.packing == "grouped":
                    units = ((dim,) * (q + k) + (1,) * dim) * spec.num_kv_heads
                else:
                    units = (dim,) * (q + k) * spec.num_kv_heads + (1,) * dim * spec.num_kv_heads
                found[f"{path}.qkv.weight"] = units
            case LatentAttention(spec=spec):
                found[f"{path}.q_up.weight"] = (spec.nope_dim + spec.rope_dim,) * spec.num_heads
                found[f"{path}.kv_up.weight"] = ((spec.nope_dim,) + (1,) * spec.v_dim) * spec.num_heads
            case FilteredAttention(spec=spec):
                found[f"{path}.qk.weight"] = (spec.head_dim,) * 2 * spec.num_heads
    return found


def embedding_names(model: Decoder) -> frozenset[str]:
    """Parameters that are looked up by token or position."""
    tables = [name for name, _ in model.embedding.named_parameters() if name in ("weight", "positions.weight")]
    return frozenset(f"embedding.{name}" for name in tables)


def _parts(model: Decoder) -> Iterator[tuple[str, nn.Module]]:
    """Modules inside the blocks with their paths."""
    for path, module in model.named_modules():
        if path.startswith("layers."):
            yield path, module


def _fused(model: Decoder) -> Iterator[tuple[str, RowBlocks]]:
    for path, module in _parts(model):
        match module:
            case Attention(spec=spec):
                yield f"{path}.qkv", _qkv(spec)
            case FilteredAttention(spec=spec):
                yield f"{path}.qk", RowBlocks(sizes=(spec.head_dim,) * 2, groups=spec.num_heads)
            case GatedFeedForward() | Experts():
                half = module.gate_up.spec.out_features // 2
                yield f"{path}.gate_up", RowBlocks(sizes=(half, half))


def _qkv(spec: GQA) -> RowBlocks:
    heads, groups, dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
    if spec.packing == "grouped":
        return RowBlocks(sizes=(heads // groups * dim, dim, dim), groups=groups)
    return RowBlocks(sizes=(heads * dim, groups * dim, groups * dim))
