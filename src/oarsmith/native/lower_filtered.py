"""Localized filtering attention as operations. Shapes: D hidden, C channels, H heads, K head dim."""

from __future__ import annotations

import torch
from torch import Tensor

from oarsmith.models.lfa import FilteredAttention, Tap
from oarsmith.native.lower_attention import pad_columns, padded_dim, padded_rows, turns
from oarsmith.native.lowering import Lowering, Source, Target
from oarsmith.native.program import Attention, Operation


def filtered_attention(low: Lowering, module: FilteredAttention, layer: int, source: Source, target: Target) -> None:
    """Two convolutions of width 2, each a product with a row and the one before it, then attention."""
    spec, size = module.spec, low.spec.hidden_size
    heads, dim = spec.num_heads, padded_dim(spec.head_dim)
    normed, filtered = low.buffer("normed", size), low.buffer("filtered", size)
    low.normed(source.buffer, source.norm, normed)
    channels = low.buffer("channels", size // 2)
    _convolve(low, module.filter.first, normed, channels)
    _convolve(low, module.filter.second, channels, filtered)
    low.normed(normed, None, filtered, keep=1.0)
    qkv, mixed = low.buffer("qkv", 3 * heads * dim), low.buffer("mixed", heads * dim)
    low.linear(Source(filtered, low.norm(module.filter.norm)), module.qk, qkv, rows=_qk_rows(heads, spec.head_dim))
    value_rows = padded_rows(torch.arange(heads * spec.head_dim), spec.head_dim)
    low.linear(Source(normed), module.v, qkv, rows=value_rows, target_offset=2 * heads * dim)
    operation = Attention(
        heads=heads,
        kv_heads=heads,
        key_dim=dim,
        value_dim=dim,
        keys_at=heads * dim,
        values_at=2 * heads * dim,
        layer=layer,
        scale=spec.scale,
        turns=turns(low, spec.position, 0),
    )
    low.ops.append(Operation(kind="attend", source=qkv, target=mixed, attention=operation))
    low.add_linear(Source(mixed), module.out, target, change=pad_columns(spec.head_dim))


def _convolve(low: Lowering, tap: Tap, source: int, target: int) -> None:
    _, out, size = tap.weight.shape
    both = low.buffer("both", 2 * size)
    low.ops.append(Operation(kind="join", source=source, target=both, state=len(low.states)))
    low.states.append(size)
    weight: Tensor = torch.cat(tap.weight.detach().unbind(), 1)
    low.ops.append(
        Operation(
            kind="linear",
            source=both,
            target=target,
            matrix=low.weights.matrix(weight, low.format),
            bias=low.weights.rows(tap.bias),
        )
    )
    assert weight.shape == (out, 2 * size)


def _qk_rows(heads: int, dim: int) -> Tensor:
    """Rows are head by head a query and a key: all queries, then all keys."""
    q, k = torch.arange(2 * heads * dim).view(heads, 2, dim).unbind(1)
    return torch.cat([padded_rows(q.reshape(-1), dim), padded_rows(k.reshape(-1), dim)])
