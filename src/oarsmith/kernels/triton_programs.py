"""Attention over slots of keys and values as Triton programs; ``triton_attention.py`` says what each is given.

A program works on a tile: BLOCK_Q queries of a span, for HEADS of the heads that share a kv head. Row m is query
m // HEADS and head m % HEADS, so that a key is read once for all of them.
"""

# Triton gives these functions their types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def tile_rows(blocks, shared, HEADS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr):
    """Of each row of this program's tile: the query's token, its head, its position in the span, whether it exists."""
    block = blocks + tl.program_id(0) * 6
    first, stop, position = tl.load(block), tl.load(block + 1), tl.load(block + 4)
    row = tl.arange(0, BLOCK_M)
    chunks = tl.cdiv(shared, HEADS)
    group, chunk = tl.program_id(1) // chunks, tl.program_id(1) % chunks
    query, of_group = row // HEADS, chunk * HEADS + row % HEADS
    exists = (query < BLOCK_Q) & (first + query < stop) & (of_group < shared)
    return first + query, group * shared + of_group, position + query, exists


@triton.jit
def tile_keys(blocks, split, num_splits, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of this program: the span's first key, the keys [start, stop) of the span it sees, and the span's prefix."""
    block = blocks + tl.program_id(0) * 6
    first, end, origin = tl.load(block), tl.load(block + 1), tl.load(block + 2)
    keys, position, prefix = tl.load(block + 3), tl.load(block + 4), tl.load(block + 5)
    stop = tl.maximum(position + end - first, tl.minimum(prefix, keys))
    start = stop * 0
    if WINDOW > 0:
        start = tl.maximum(position - WINDOW + 1, 0)
    share = tl.cdiv(tl.cdiv(stop - start, num_splits), BLOCK_N) * BLOCK_N
    start = start + split * share
    return origin, start, tl.minimum(start + share, stop), prefix


@triton.jit
def changed(
    s, key, inside, head, position, exists, scale, bias, bias_row, prefix, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr
):
    """Products [BLOCK_M, BLOCK_N] of queries and keys as exponents of 2, -inf where a query does not see a key."""
    s = s * scale
    if SOFTCAP > 0:
        # The hyperbolic tangent; exp may become infinite, which is right.
        s = SOFTCAP * (1 - 2 / (tl.exp(2 * s / SOFTCAP) + 1))
    if bias is not None:
        row = bias + head.to(tl.int64) * bias_row
        own = tl.load(row + position, mask=exists, other=0.0)
        s += tl.load(row[:, None] + key[None, :], mask=exists[:, None] & inside[None, :], other=0.0) - own[:, None]
    visible = (key[None, :] <= position[:, None]) | (key[None, :] < prefix)
    if WINDOW > 0:
        visible = visible & (position[:, None] - key[None, :] < WINDOW)
    return tl.where(visible & inside[None, :], s * LOG2E, float("-inf"))


@triton.jit
def finite(most):
    """A maximum that can be subtracted: 0 where nothing was seen."""
    return tl.where(most == float("-inf"), 0.0, most)


@triton.jit
def load_part(x, rows, entries, rows_exist, SIZE: tl.constexpr):
    """Entries of vectors that start at ``rows``; both are laid out for the shape wanted. 0 where there are none."""
    return tl.load(x + rows + entries, mask=rows_exist & (entries < SIZE), other=0.0)


@triton.jit
def attend(
    q, k, v, out, parts, sums, blocks, slots, bias, sinks,
    q_token, q_head, k_slot, k_head, v_slot, v_head, bias_row,
    shared, num_heads, num_splits, scale,
    K: tl.constexpr, V: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, V0: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile's attention over one of ``num_splits`` shares of its keys: to ``out``, or unfinished to ``parts``."""
    split = tl.program_id(2)
    token, head, position, exists = tile_rows(blocks, shared, HEADS, BLOCK_Q, BLOCK_M)
    origin, start, stop, prefix = tile_keys(blocks, split, num_splits, WINDOW, BLOCK_N)
    group = (tl.program_id(1) // tl.cdiv(shared, HEADS)).to(tl.int64)
    k0, k1, v0 = tl.arange(0, K0), K0 + tl.arange(0, K1 if K1 > 0 else 16), tl.arange(0, V0)
    q_rows = token[:, None].to(tl.int64) * q_token + head[:, None] * q_head
    q0 = load_part(q, q_rows, k0[None, :], exists[:, None], K)
    if K1 > 0:
        q1 = load_part(q, q_rows, k1[None, :], exists[:, None], K)
    most = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if sinks is not None:  # noqa: SIM102 - known when compiled, unlike the split
        if split == 0:
            most = tl.load(sinks + head, mask=exists, other=0.0).to(tl.float32) * LOG2E
            total += 1.0
    mixed = tl.zeros([BLOCK_M, V0], tl.float32)
    for at in range(start, stop, BLOCK_N):
        key = at + tl.arange(0, BLOCK_N)
        inside = key < stop
        slot = (origin + key).to(tl.int64)
        if slots is not None:
            slot = tl.load(slots + slot, mask=inside, other=0).to(tl.int64)
        k_rows = slot[None, :] * k_slot + group * k_head
        s = tl.dot(q0, load_part(k, k_rows, k0[:, None], inside[None, :], K), input_precision="ieee")
        if K1 > 0:
            s += tl.dot(q1, load_part(k, k_rows, k1[:, None], inside[None, :], K), input_precision="ieee")
        s = changed(s, key, inside, head, position, exists, scale, bias, bias_row, prefix, WINDOW, SOFTCAP)
        higher = tl.maximum(most, tl.max(s, 1))
        kept = tl.exp2(most - finite(higher))
        p = tl.exp2(s - finite(higher)[:, None])
        values = load_part(v, slot[:, None] * v_slot + group * v_head, v0[None, :], inside[:, None], V)
        mixed = mixed * kept[:, None] + tl.dot(p.to(values.dtype), values, input_precision="ieee")
        total, most = total * kept + tl.sum(p, 1), higher
    store(out, parts, sums, mixed, most, total, token, head, exists, num_heads, num_splits, V, V0, BLOCK_M)


@triton.jit
def store(
    out, parts, sums, mixed, most, total, token, head, exists, num_heads, num_splits,
    V: tl.constexpr, V0: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The tile's rows, divided by their sums; or as they are, with maxima and sums, for ``finish``."""
    v0 = tl.arange(0, V0)
    if parts is None:
        rows = (token.to(tl.int64) * num_heads + head) * V
        value = (mixed / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + rows[:, None] + v0[None, :], value, mask=exists[:, None] & (v0[None, :] < V))
    else:
        tile = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        rows = (tile * num_splits + tl.program_id(2)) * BLOCK_M + tl.arange(0, BLOCK_M)
        tl.store(parts + rows[:, None] * V0 + v0[None, :], mixed, mask=exists[:, None])
        tl.store(sums + rows * 2, most, mask=exists)
        tl.store(sums + rows * 2 + 1, total, mask=exists)


@triton.jit
def finish(
    out, parts, sums, blocks, shared, num_heads, num_splits,
    V: tl.constexpr, V0: tl.constexpr, HEADS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """One row of a tile from what the splits made of it."""
    block, row = blocks + tl.program_id(0) * 6, tl.program_id(2)
    chunks = tl.cdiv(shared, HEADS)
    group, chunk = tl.program_id(1) // chunks, tl.program_id(1) % chunks
    token, of_group = tl.load(block) + row // HEADS, chunk * HEADS + row % HEADS
    if (row // HEADS < BLOCK_Q) & (token < tl.load(block + 1)) & (of_group < shared):
        tile = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        first = tile * num_splits * BLOCK_M + row
        split = tl.arange(0, SPLITS)
        there = split < num_splits
        own = (first + split * BLOCK_M) * 2
        most = tl.load(sums + own, mask=there, other=float("-inf"))
        highest = finite(tl.max(most, 0))
        total = tl.sum(tl.load(sums + own + 1, mask=there, other=0.0) * tl.exp2(most - highest), 0)
        v0 = tl.arange(0, V0)
        mixed = tl.zeros([V0], tl.float32)
        for at in range(num_splits):
            place = first + at * BLOCK_M
            mixed += tl.load(parts + place * V0 + v0) * tl.exp2(tl.load(sums + place * 2) - highest)
        rows = (token.to(tl.int64) * num_heads + group * shared + of_group) * V
        tl.store(out + rows + v0, (mixed / total).to(out.dtype.element_ty), mask=v0 < V)
