"""Attention as operations."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from oarsmith.models.attention import Attention as AttentionModule
from oarsmith.models.spec_parts import GQA
from oarsmith.models.spec_position import Position
from oarsmith.native.lowering import Lowering, NormModule, Source, Target
from oarsmith.native.positions import bias_table, rotation
from oarsmith.native.program import Attention, Norm, Operation, Vector


def attention(low: Lowering, module: AttentionModule, layer: int, source: Source, target: Target) -> None:
    """Queries, keys and values in one product, the cache, the scores, and the map back to the stream."""
    spec = module.spec
    dim, rows = padded_dim(spec.head_dim), qkv_rows(spec)
    qkv = low.buffer("qkv", len(rows))
    mixed = low.buffer("mixed", spec.num_heads * dim)
    low.linear(source, module.qkv, qkv, rows=rows)
    over_head = spec.qk_norm is None or spec.qk_norm.over == "head"
    operation = Attention(
        heads=spec.num_heads,
        kv_heads=spec.num_kv_heads,
        dim=dim,
        layer=layer,
        scale=spec.scale,
        rotation=_rotation(low, spec.position),
        q_norm=_norm(low, module.q_norm, spec.head_dim, over_head),
        k_norm=_norm(low, module.k_norm, spec.head_dim, over_head),
        window=spec.window,
        softcap=spec.softcap,
        log_n=spec.log_n,
        bias=_bias(low, spec.position),
        sinks=None if module.sinks is None else low.weights.vector(module.sinks),
    )
    low.ops.append(Operation(kind="attend", source=qkv, target=mixed, attention=operation))
    low.add_linear(Source(mixed), module.out, target, weight=pad_out_columns(module.out.weight, spec))


def padded_dim(dim: int) -> int:
    """The head dim that the step computes with."""
    return -(-dim // 16) * 16


def qkv_rows(spec: GQA) -> Tensor:
    """Which row of the decoder's ``qkv`` stands where: all queries, all keys, all values, heads padded; -1: padding."""
    heads, groups, dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
    place = torch.arange((heads + 2 * groups) * dim)
    if spec.packing == "grouped":
        q, k, v = place.view(groups, heads // groups + 2, dim).split((heads // groups, 1, 1), 1)
        place = torch.cat([q.reshape(-1), k.reshape(-1), v.reshape(-1)])
    return functional.pad(place.view(-1, dim), (0, padded_dim(dim) - dim), value=-1).flatten()


def pad_out_columns(weight: Tensor, spec: GQA) -> Tensor:
    """The output map [D, H K] for padded heads."""
    missing = padded_dim(spec.head_dim) - spec.head_dim
    if not missing:
        return weight
    return functional.pad(weight.detach().unflatten(1, (-1, spec.head_dim)), (0, missing)).flatten(1)


def _norm(low: Lowering, module: NormModule | None, dim: int, over_head: bool) -> Norm | None:
    """A norm of queries or keys. Over the whole projection it counts the padding of heads, but not as numbers."""
    if module is None:
        return None
    norm, missing = low.norm(module), padded_dim(dim) - dim
    if over_head or not missing:
        return norm
    assert not norm.centered and module.weight is not None, "the padding would not stay 0"
    weight = functional.pad(module.weight.detach().float().view(-1, dim), (0, missing)).flatten()
    return replace(norm, size=len(weight), weight=low.weights.vector(weight))


def _rotation(low: Lowering, position: Position | None) -> int | None:
    if position not in low.rotation_of:
        found = None if position is None else rotation(position, low.spec.max_positions, low.weights)
        low.rotation_of[position] = None if found is None else len(low.rotations)
        low.rotations += [] if found is None else [found]
    return low.rotation_of[position]


def _bias(low: Lowering, position: Position | None) -> Vector | None:
    table = bias_table(position, low.spec.max_positions)
    if table is None:
        return None
    if position not in low.bias_of:
        low.bias_of[position] = low.weights.vector(table)
    return low.bias_of[position]
