"""A decoder as a list of operations: what the compiled step runs (cpp/program.h), as plain values.

Weights are places in an arena, one run of bytes (see ``arena.py``), so a program can be kept in a file beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from oarsmith.models.cache_form import CacheForm
from oarsmith.models.facts import ModelFacts

FORMATS = ("fp32", "bf16", "int8", "int4", "fp16", "e4m3")
ACTIVATIONS = ("none", "silu", "gelu", "gelu_tanh", "relu", "relu2", "clamped_swiglu", "sigmoid", "cap")
KINDS = ("embed", "norm", "linear", "attend", "heads", "join", "experts")
INTO = ("store", "add", "gated")

Kind = Literal["embed", "norm", "linear", "attend", "heads", "join", "experts"]
Into = Literal["store", "add", "gated"]


@dataclass(frozen=True)
class Vector:
    """fp32 numbers in the arena."""

    offset: int
    size: int


@dataclass(frozen=True)
class Matrix:
    """Packed weights [rows, columns] in the arena (cpp/matrix.h)."""

    format: str
    rows: int
    columns: int
    offset: int


@dataclass(frozen=True, kw_only=True)
class Norm:
    """RMS norm, or layer norm where it is ``centered``.

    ``count`` of the ``size`` numbers are no padding. ``weights``: pieces of this size that have weights of their own.
    """

    size: int
    count: int
    eps: float
    centered: bool = False
    weight: Vector | None = None
    bias: Vector | None = None
    weights: int = 1


@dataclass(frozen=True)
class Turn:
    """Entries of a head from ``offset`` on turn by a rotation of the program."""

    rotation: int
    offset: int = 0


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Grouped-query attention. Dims are padded to multiples of 16.

    A buffer holds the queries, head by head, and from these columns on keys and values.
    """

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    keys_at: int
    values_at: int
    layer: int
    scale: float
    turns: tuple[Turn, ...] = ()
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    window: int | None = None
    softcap: float | None = None
    log_n: int | None = None
    bias: Vector | None = None
    sinks: Vector | None = None


@dataclass(frozen=True, kw_only=True)
class Experts:
    """How experts are chosen (``RouterSpec``) and their maps; ``hidden``: the buffer between the two."""

    top_k: int
    sigmoid: bool
    normalize: bool
    scale: float
    hidden: int
    gate_up: tuple[Matrix, ...]
    down: tuple[Matrix, ...]
    activation: str
    alpha: float = 0.0
    limit: float = 0.0
    groups: int = 0
    kept_groups: int = 0
    best_of_group: int = 0
    correction: Vector | None = None
    gate_up_bias: Vector | None = None
    down_bias: Vector | None = None


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One step of the program: what cpp/program.h says of its fields. Buffers are numbers; -1: none."""

    kind: Kind
    target: int
    source: int = -1
    scores: int = -1
    into: Into = "store"
    activation: str = "none"
    keep: float = 0.0
    scale: float = 1.0
    alpha: float = 0.0
    limit: float = 0.0
    norm: Norm | None = None
    matrix: Matrix | None = None
    width: int = 0
    bias: Vector | None = None
    positions: Vector | None = None
    position_offset: int = 0
    target_offset: int = 0
    matrices: tuple[Matrix, ...] = ()
    source_step: int = 0
    target_step: int = 0
    state: int = 0
    attention: Attention | None = None
    experts: Experts | None = None


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """Sets of frequencies [sets, frequencies]; set i holds from length ``starts[i]`` on.

    ``follows``: the length of the document at the token, or that of its prompt. ``of_blocks``: it turns by the second
    kind of position.
    """

    sets: Vector
    frequencies: int
    adjacent: bool
    factor: float = 1.0
    starts: tuple[int, ...] = (0,)
    follows: Literal["length", "prompt"] = "length"
    of_blocks: bool = False


@dataclass(frozen=True, kw_only=True)
class Program:
    """A whole decoder.

    Attributes:
        widths: of the buffers. ``stream`` holds the hidden states, ``head_input`` those rows of them that need logits.
        cache: kv heads, key dim and value dim of each layer. ``states``: widths of what is kept of a sequence besides.
        stored: how keys and values are kept, "fp32" or "bf16".
        arena_bytes: how much memory its weights take.
        own_form: how the checkpoint wants keys and values to be kept, if it says so.
    """

    facts: ModelFacts
    widths: tuple[int, ...]
    stream: int
    head_input: int
    logits: int
    body: tuple[Operation, ...]
    head: tuple[Operation, ...]
    rotations: tuple[Rotation, ...]
    cache: tuple[tuple[int, int, int], ...]
    states: tuple[int, ...] = ()
    stored: Literal["fp32", "bf16"]
    arena_bytes: int
    own_form: CacheForm | None = None

    def page_bytes(self, page_size: int, *, form: CacheForm | None = None) -> int:
        """Memory of a page of the cache; ``form``: in 8 bits, as cpp/rounded.h and cpp/fixed.h have them."""
        if form is not None and not form.in_groups:
            return page_size * sum(heads * (key + value) for heads, key, value in self.cache)
        if form is None:
            numbers = sum(heads * (key + value) for heads, key, value in self.cache)
            return numbers * page_size * (4 if self.stored == "fp32" else 2)
        each = ((heads, -(-key // 32), -(-value // 32), value) for heads, key, value in self.cache)
        return page_size * sum(heads * (34 * of_key + 2 * of_value + value) for heads, of_key, of_value, value in each)
