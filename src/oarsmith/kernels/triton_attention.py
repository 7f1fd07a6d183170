"""Attention over slots of keys and values on a GPU: what the Triton programs are given, and how large their tiles are.

Shapes: T query tokens, S key slots, H query heads, G kv heads, K key dim, V value dim, N keys of the spans.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
from torch import Tensor

from oarsmith.kernels import triton_programs

if TYPE_CHECKING:
    from oarsmith.kernels.attention import KeyRange, Scores, SpanBounds

_log = logging.getLogger(__name__)

# Spans of at most so many rows (queries times heads that share a kv head), or of one query, are tiled by themselves: a
# long prompt beside them wants larger tiles.
_FEW_ROWS = 64
# A split has at least so many keys, or starting it and putting the splits together costs more than it gains.
_SPLIT_KEYS = 256
_MOST_SPLITS = 64
# What tests without a GPU are told: an A100's processors and shared memory.
_NO_GPU = (108, 166_912)


class Sizes(NamedTuple):
    """What tiles depend on. ``shared``: query heads of a kv head; ``itemsize``: bytes of an entry."""

    shared: int
    key_dim: int
    value_dim: int
    itemsize: int


class Tile(NamedTuple):
    """What a program works on, and how.

    ``rows``: at least ``queries`` x ``heads``; ``keys``: of a turn of its loop; ``warps`` run it; ``stages``: turns
    whose keys are on their way or in shared memory.
    """

    rows: int
    queries: int
    heads: int
    keys: int
    warps: int
    stages: int


class Group(NamedTuple):
    """Tiles of one shape. ``table``: int32 [tiles, 6], see ``triton_programs.tile_rows`` and ``tile_keys``."""

    tile: Tile
    table: Tensor
    most_keys: int


def covers(q_THK: Tensor, k_SGK: Tensor, v_SGV: Tensor, scores: Scores) -> bool:
    """Whether the programs can do this call; if not, the log says why, once."""
    if scores.sinks_H is not None and scores.sinks_H.requires_grad and torch.is_grad_enabled():
        return False
    reason = None
    if any(x.stride(-1) != 1 for x in (q_THK, k_SGK, v_SGV)):
        reason = "entries of a head do not lie side by side"
    elif scores.bias_HP is not None and scores.bias_HP.stride(-1) != 1:
        reason = "biases of a head do not lie side by side"
    elif tile_for(_sizes(q_THK, k_SGK, v_SGV), 1, _device(q_THK.device)[1]) is None:
        reason = f"heads of {k_SGK.shape[2]} and {v_SGV.shape[2]} entries are too large for this GPU's shared memory"
    if reason is not None:
        _say(reason)
    return reason is None


def attention(
    q_THK: Tensor,
    k_SGK: Tensor,
    v_SGV: Tensor,
    spans: Sequence[SpanBounds],
    scores: Scores,
    ranges: Sequence[KeyRange] | None = None,
) -> Tensor:
    """As ``kernels.attention`` without gradients: products and sums in fp32, probabilities rounded to v's dtype."""
    out_THV = q_THK.new_empty((*q_THK.shape[:2], v_SGV.shape[2]))
    slots_N = None if ranges is None else _slots(_Same(ranges), q_THK.device)
    with torch.cuda.device_of(q_THK):
        for group in _groups(tuple(spans), _sizes(q_THK, k_SGK, v_SGV), q_THK.device):
            _run(group, q_THK, k_SGK, v_SGV, out_THV, slots_N, scores)
    return out_THV


def _run(
    group: Group, q_THK: Tensor, k_SGK: Tensor, v_SGV: Tensor, out_THV: Tensor, slots_N: Tensor | None, scores: Scores
) -> None:
    tile, sizes = group.tile, _sizes(q_THK, k_SGK, v_SGV)
    heads = k_SGK.shape[1] * -(-sizes.shared // tile.heads)
    num_tiles, bias_HP = len(group.table), scores.bias_HP
    splits = num_splits(num_tiles * heads, group.most_keys, scores.window, _device(q_THK.device)[0])
    parts = sums = None
    columns = value_columns(sizes.value_dim)
    if splits > 1:
        parts = torch.empty((num_tiles, heads, splits, tile.rows, columns), device=q_THK.device)
        sums = torch.empty((num_tiles, heads, splits, tile.rows, 2), device=q_THK.device)
    k0, k1 = key_columns(sizes.key_dim)
    shape = {"V": sizes.value_dim, "V0": columns, "HEADS": tile.heads, "BLOCK_Q": tile.queries, "BLOCK_M": tile.rows}
    triton_programs.attend[num_tiles, heads, splits](
        *(q_THK, k_SGK, v_SGV, out_THV, parts, sums, group.table, slots_N, bias_HP, scores.sinks_H),
        *(stride for x in (q_THK, k_SGK, v_SGV) for stride in x.stride()[:2]),
        0 if bias_HP is None else bias_HP.stride(0),
        *(sizes.shared, q_THK.shape[1], splits, scores.scale),
        **shape,
        K=sizes.key_dim,
        K0=k0,
        K1=k1,
        WINDOW=scores.window or 0,
        SOFTCAP=scores.softcap or 0.0,
        BLOCK_N=tile.keys,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if splits > 1:
        triton_programs.finish[num_tiles, heads, tile.rows](
            *(out_THV, parts, sums, group.table, sizes.shared, q_THK.shape[1], splits),
            **shape,
            SPLITS=triton.next_power_of_2(splits),
            num_warps=1 if columns <= 128 else 4,
        )


def num_splits(programs: int, keys: int, window: int | None, processors: int) -> int:
    """Into how many parts the keys of each tile are split: two programs for each processor, where keys are enough."""
    seen = keys if window is None else min(keys, window)
    return max(1, min(2 * processors // max(programs, 1), seen // _SPLIT_KEYS, _MOST_SPLITS))


def key_columns(dim: int) -> tuple[int, int]:
    """Powers of two that hold a key, in one part or, where that is less, in two (a latent and its rotary part)."""
    whole = max(triton.next_power_of_2(dim), 16)
    if dim <= 16 or whole == dim:
        return whole, 0
    rest = max(triton.next_power_of_2(dim - whole // 2), 16)
    return (whole, 0) if rest >= whole // 2 else (whole // 2, rest)


def value_columns(dim: int) -> int:
    """The power of two that holds a value."""
    return int(max(triton.next_power_of_2(dim), 16))


def tile_for(sizes: Sizes, few: int | None, memory: int) -> Tile | None:
    """The tile for spans of at most ``few`` queries (None: many) where a processor has so much shared memory.

    Rows fill the outputs' registers: 16,384 fp32 numbers are 64 in each of 256 threads. Two programs with two stages
    should fit a processor; large heads take what there is. None where nothing fits.
    """
    columns = value_columns(sizes.value_dim)
    rows = min(max(16_384 // columns, 16), 128)
    if few is not None:
        rows = min(rows, _FEW_ROWS, max(triton.next_power_of_2(few * sizes.shared), 16))
    chunks = -(-sizes.shared // rows)
    heads = -(-sizes.shared // chunks)
    key_entries = sum(key_columns(sizes.key_dim))
    # Three fifths, as what is counted here is more than what the compiler takes: then two programs still fit.
    options = [(keys, stages, memory * 3 // 5) for keys, stages in ((64, 3), (64, 2), (32, 2), (16, 2))]
    options += [(keys, stages, memory) for keys, stages in ((32, 2), (16, 2), (16, 1))]
    for keys, stages, limit in options:
        # Queries, keys and values, and scores on their way from one layout to another.
        entries = rows * key_entries + stages * keys * (key_entries + columns)
        if entries * sizes.itemsize + rows * keys * 4 <= limit:
            warps = 8 if rows > 64 or rows * columns > 8192 else 4
            return Tile(rows, rows // heads, heads, keys, warps, stages)
    return None


def _sizes(q_THK: Tensor, k_SGK: Tensor, v_SGV: Tensor) -> Sizes:
    return Sizes(q_THK.shape[1] // k_SGK.shape[1], k_SGK.shape[2], v_SGV.shape[2], q_THK.element_size())


class _Same:
    """Ranges told apart by identity: they are many, and a step's layers are given the same ones."""

    def __init__(self, ranges: Sequence[KeyRange]) -> None:
        # What can change is copied, and so never the same.
        self.ranges = ranges if isinstance(ranges, tuple) else tuple(ranges)

    def __hash__(self) -> int:
        return id(self.ranges)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.ranges is other.ranges


# Of the last steps only: what depends on the layout alone is made once for all layers.
@functools.lru_cache(maxsize=2)
def _slots(where: _Same, device: torch.device) -> Tensor:
    """The slot of each key, int32 [N]: made on the device, as they may be millions."""
    places = torch.tensor([(stop - start, slot - start) for start, stop, slot in where.ranges]).to(device)
    num_keys = where.ranges[-1][1]
    shifts_N = places[:, 1].repeat_interleave(places[:, 0], output_size=num_keys)
    return (torch.arange(num_keys, device=device) + shifts_N).int()


@functools.lru_cache(maxsize=8)
def _groups(spans: tuple[SpanBounds, ...], sizes: Sizes, device: torch.device) -> tuple[Group, ...]:
    most = max(_FEW_ROWS // sizes.shared, 1)
    few = [span for span in spans if 0 < span[1] - span[0] <= most]
    many = [span for span in spans if span[1] - span[0] > most]
    groups = []
    for chosen, queries in ((few, max((q1 - q0 for q0, q1, *_ in few), default=0)), (many, None)):
        if chosen:
            tile = tile_for(sizes, queries, _device(device)[1])
            assert tile is not None, "not covered"
            rows = [row for span in chosen for row in _tiles(span, tile.queries)]
            # The most work first: what is short fills the gaps at the end.
            rows.sort(key=lambda row: row[4] + row[1] - row[0], reverse=True)
            table = torch.tensor(rows, dtype=torch.int32).to(device)
            groups.append(Group(tile, table, max(row[3] for row in rows)))
    return tuple(groups)


def _tiles(span: SpanBounds, queries: int) -> list[tuple[int, ...]]:
    """First query, end of queries, first key and keys of the span, the first query's position, prefix."""
    q0, q1, k0, k1, prefix = span
    behind = (k1 - k0) - (q1 - q0) - q0
    return [(at, min(at + queries, q1), k0, k1 - k0, at + behind, prefix) for at in range(q0, q1, queries)]


@functools.cache
def _device(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and the shared memory in bytes that a program may have."""
    if device.type != "cuda":
        return _NO_GPU
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return properties["multiprocessor_count"], properties["max_shared_mem"]


@functools.cache
def _say(reason: str) -> None:
    _log.warning("attention in plain PyTorch, not by the Triton kernel: %s", reason)
