"""Attention over latents as operations.

Shapes: H heads, N nope dim, R rope dim, V value dim, L latent dim, K nope and value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from oarsmith.models.mla import LatentAttention
from oarsmith.models.spec_parts import MLA
from oarsmith.native.lower_attention import pad_columns, padded_dim, turns
from oarsmith.native.lowering import Lowering, Source, Target
from oarsmith.native.program import Attention, Operation


def latent_attention(low: Lowering, module: LatentAttention, layer: int, source: Source, target: Target) -> None:
    """DeepSeek-V2 section 2.1.2: ``kv_up`` moves to the queries and to the outputs, so all heads share one key.

    That is grouped-query attention with one kv head, whose value is the first part of its key.
    """
    spec = module.spec
    heads, latent = spec.num_heads, padded_dim(spec.latent_dim)
    key, value = padded_dim(latent + spec.rope_dim), _padded_to_pair(spec.v_dim)
    queries = low.buffer("latent queries", heads * (spec.nope_dim + spec.rope_dim))
    # The key's map writes whole pairs of blocks.
    qkv = low.buffer("latent qkv", heads * key + _padded_to_pair(key))
    mixed, out = low.buffer("latent mixed", heads * latent), low.buffer("latent out", heads * value)
    if module.q_down is not None:
        assert module.q_norm is not None, spec
        down = low.buffer("latent down", module.q_down.spec.out_features)
        low.linear(source, module.q_down, down)
        low.linear(Source(down, low.norm(module.q_norm)), module.q_up, queries)
    else:
        low.linear(source, module.q_up, queries)
    up_HKL = low.floats(module.kv_up.weight).detach().unflatten(0, (heads, -1))
    keys, values = up_HKL.split((spec.nope_dim, spec.v_dim), 1)
    _heads(low, [_to_latent(spec, k_NL) for k_NL in keys], queries, qkv, spec.nope_dim + spec.rope_dim, key)
    low.linear(source, module.kv_down, qkv, rows=_key_rows(spec), target_offset=heads * key)
    operation = Attention(
        heads=heads,
        kv_heads=1,
        key_dim=key,
        value_dim=latent,
        keys_at=heads * key,
        values_at=heads * key,
        layer=layer,
        scale=spec.scale,
        k_norm=low.norm(module.kv_norm),
        turns=turns(low, spec.position, latent),
    )
    low.ops.append(Operation(kind="attend", source=qkv, target=mixed, attention=operation))
    missing = latent - spec.latent_dim
    _heads(low, [functional.pad(v_VL, (0, missing)) for v_VL in values], mixed, out, latent, value)
    low.add_linear(Source(out), module.out, target, change=pad_columns(spec.v_dim, value))


def latent_cache(spec: MLA) -> tuple[int, int, int]:
    """Kv heads, key dim and value dim of what is kept."""
    latent = padded_dim(spec.latent_dim)
    return 1, padded_dim(latent + spec.rope_dim), latent


def _padded_to_pair(size: int) -> int:
    return -(-size // 32) * 32


def _key_rows(spec: MLA) -> Tensor:
    """Rows of ``kv_down``: the latent, padding, the rotary key."""
    rows = torch.arange(spec.latent_dim + spec.rope_dim)
    return torch.cat(
        [functional.pad(rows[: spec.latent_dim], (0, -spec.latent_dim % 16), value=-1), rows[spec.latent_dim :]]
    )


def _to_latent(spec: MLA, k_NL: Tensor) -> Tensor:
    """[nope, rope] of a query to [latent, rope]: what turns passes through unchanged."""
    latent = padded_dim(spec.latent_dim)
    weight = k_NL.new_zeros(latent + spec.rope_dim, spec.nope_dim + spec.rope_dim)
    weight[: spec.latent_dim, : spec.nope_dim] = k_NL.T
    weight[latent:, spec.nope_dim :] = torch.eye(spec.rope_dim, dtype=k_NL.dtype)
    return weight


def _heads(low: Lowering, weights: list[Tensor], source: int, target: int, source_step: int, target_step: int) -> None:
    # Not rounded to integers: the ones that pass the rotary part through must stay ones.
    format = "fp32" if low.format == "fp32" else "bf16"
    low.ops.append(
        Operation(
            kind="heads",
            source=source,
            target=target,
            # At once: each is made of the map's weight, which may still have to be read.
            matrices=tuple(low.weights.packed(weight, format) for weight in weights),
            source_step=source_step,
            target_step=target_step,
        )
    )
