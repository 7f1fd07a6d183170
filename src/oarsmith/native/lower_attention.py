"""Attention as operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from oarsmith.models.attention import Attention as AttentionModule
from oarsmith.models.spec_parts import GQA
from oarsmith.models.spec_position import Position, Rope, TwoRowRope
from oarsmith.native.lowering import Lowering, NormModule, Source, Target
from oarsmith.native.positions import bias_table, rotation
from oarsmith.native.program import Attention, Norm, Operation, Turn, Vector


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
        key_dim=dim,
        value_dim=dim,
        keys_at=spec.num_heads * dim,
        values_at=(spec.num_heads + spec.num_kv_heads) * dim,
        layer=layer,
        scale=spec.scale,
        turns=turns(low, spec.position, 0),
        q_norm=_norm(low, module.q_norm, spec.head_dim, over_head),
        k_norm=_norm(low, module.k_norm, spec.head_dim, over_head),
        window=spec.window,
        softcap=spec.softcap,
        log_n=spec.log_n,
        bias=_bias(low, spec.position),
        sinks=None if module.sinks is None else low.weights.vector(module.sinks),
    )
    low.ops.append(Operation(kind="attend", source=qkv, target=mixed, attention=operation))
    low.add_linear(Source(mixed), module.out, target, change=pad_columns(spec.head_dim))


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
    return padded_rows(place, dim)


def padded_rows(rows: Tensor, dim: int) -> Tensor:
    """Rows of heads with -1 where a padded head has none."""
    return functional.pad(rows.view(-1, dim), (0, padded_dim(dim) - dim), value=-1).flatten()


def pad_columns(dim: int, wanted: int | None = None) -> Callable[[Tensor], Tensor] | None:
    """What makes of an output map [D, H K] one for padded heads; None: they need no padding.

    ``wanted``: how wide the heads become; not given: as `padded_dim` has it.
    """
    missing = (padded_dim(dim) if wanted is None else wanted) - dim
    if not missing:
        return None
    return lambda weight: functional.pad(weight.detach().unflatten(1, (-1, dim)), (0, missing)).flatten(1)


def turns(low: Lowering, position: Position | None, offset: int) -> tuple[Turn, ...]:
    """How entries of a head turn from ``offset`` on: none, one rotation, or one for each half."""
    match position:
        case Rope():
            return (Turn(_rotation(low, position, of_blocks=False), offset),)
        case TwoRowRope(rope=rope):
            halves = _rotation(low, rope, of_blocks=False), _rotation(low, rope, of_blocks=True)
            return Turn(halves[0], offset), Turn(halves[1], offset + rope.dim)
        case _:
            return ()


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


def _rotation(low: Lowering, rope: Rope, *, of_blocks: bool) -> int:
    key = rope, of_blocks
    if key not in low.rotation_of:
        low.rotation_of[key] = len(low.rotations)
        low.rotations.append(rotation(rope, low.spec.max_positions, low.weights, of_blocks=of_blocks))
    return low.rotation_of[key]


def _bias(low: Lowering, position: Position | None) -> Vector | None:
    table = bias_table(position, low.spec.max_positions)
    if table is None:
        return None
    if position not in low.bias_of:
        low.bias_of[position] = low.weights.vector(table)
    return low.bias_of[position]
