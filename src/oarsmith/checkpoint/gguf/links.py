"""Which tensors of a GGUF file are which tensors of a Hugging Face directory, and what is done between the two.

A `Link` joins file tensors on the two sides that hold the same numbers; its `Change` can be played both ways. The
tables of links are in the ``gguf_arch_*`` modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Both = Callable[[list[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class Change:
    """An invertible map between the tensors of the two sides. ``arithmetic``: it computes, so it is done in float32."""

    to_gguf: Both
    to_hf: Both
    arithmetic: bool = False


@dataclass(frozen=True)
class Part:
    """A GGUF tensor: its name and the names of its dimensions, row-major."""

    name: str
    shape: str

    def below(self, prefix: str) -> Part:
        return Part(f"{prefix}{self.name}", self.shape)

    def in_layer(self, index: int) -> Part:
        return Part(self.name.replace("{i}", str(index)), self.shape)


@dataclass(frozen=True)
class Link:
    """Tensors of a Hugging Face directory and the GGUF tensors that hold the same numbers.

    Attributes:
        hf: names; ``{i}`` stands for the layer and ``{e}`` for the expert.
        parts: the GGUF side; of a link with ``{e}`` each part holds all experts, which is its first dimension.
        layers: the layers it occurs in; None outside layers.
        required: may not be missing. An optional link occurs in all of its layers or in none.
        older: the one tensor, unchanged, that older files hold instead of the parts.
    """

    hf: tuple[str, ...]
    parts: tuple[Part, ...]
    change: Change
    required: bool = True
    layers: tuple[int, ...] | None = None
    older: Part | None = None

    @property
    def per_expert(self) -> bool:
        return "{e}" in self.hf[0]


def link(
    gguf: str | Sequence[str],
    hf: str | Sequence[str],
    shape: str | Sequence[str],
    change: Change | None = None,
    *,
    required: bool = True,
    older: Part | None = None,
) -> Link:
    """A `Link` from plain strings; ``shape`` goes with ``gguf``."""
    names = [gguf] if isinstance(gguf, str) else gguf
    shapes = [shape] if isinstance(shape, str) else shape
    return Link(
        hf=(hf,) if isinstance(hf, str) else tuple(hf),
        parts=tuple(Part(name, dims) for name, dims in zip(names, shapes, strict=True)),
        change=change or KEEP,
        required=required,
        older=older,
    )


def linear(gguf: str, hf: str, shape: str, change: Change | None = None, *, bias: bool | None = None) -> list[Link]:
    """``.weight`` and ``.bias`` of one map. ``bias``: True has one, False has none, None may have one."""
    links = [link(f"{gguf}.weight", f"{hf}.weight", shape, change)]
    if bias is not False:
        # A bias has the weight's rows: whatever reorders rows fits both; a transpose does not.
        change = None if change is TRANSPOSE else change
        links.append(link(f"{gguf}.bias", f"{hf}.bias", shape.split()[0], change, required=bool(bias)))
    return links


def norm(gguf: str, hf: str, shape: str = "hidden", change: Change | None = None, *, bias: bool = False) -> list[Link]:
    """A norm's weight, and its bias where it has one."""
    return linear(gguf, hf, shape, change, bias=bias)


def in_layers(hf_prefix: str, links: Iterable[Link], layers: Iterable[int]) -> list[Link]:
    """The links inside each of ``layers``, below ``hf_prefix{i}.`` and ``blk.{i}.``."""
    indices = tuple(layers)
    return [
        replace(
            item,
            hf=tuple(f"{hf_prefix}{{i}}.{name}" for name in item.hf),
            parts=tuple(part.below("blk.{i}.") for part in item.parts),
            layers=indices,
            older=item.older and item.older.below("blk.{i}."),
        )
        for item in links
    ]


def expand(item: Link) -> list[Link]:
    """One link for each layer, with the layer's number in its names."""
    if item.layers is None:
        return [item]
    return [
        replace(
            item,
            hf=tuple(name.replace("{i}", str(index)) for name in item.hf),
            parts=tuple(part.in_layer(index) for part in item.parts),
            older=item.older and item.older.in_layer(index),
        )
        for index in item.layers
    ]


def dim_sizes(shape: str, dims: Mapping[str, int]) -> tuple[int, ...]:
    """Sizes of the named dimensions; a number stands for itself."""
    return tuple(int(name) if name.isdigit() else dims[name] for name in shape.split())


def _each(function: Callable[[Tensor], Tensor]) -> Both:
    return lambda tensors: [function(tensor) for tensor in tensors]


def _whole(tensors: list[Tensor]) -> list[Tensor]:
    return tensors


KEEP = Change(_whole, _whole)
TRANSPOSE = Change(_each(lambda t: t.transpose(-1, -2)), _each(lambda t: t.transpose(-1, -2)))
PLUS_ONE = Change(_each(lambda t: t + 1), _each(lambda t: t - 1), arithmetic=True)
ROW = Change(_each(lambda t: t.reshape(-1)), _each(lambda t: t.reshape(1, -1)))
"""A matrix of one row is a vector in GGUF."""
UNIT_ROWS = Change(_each(lambda t: torch.nn.functional.normalize(t, dim=-1)), _whole, arithmetic=True)
"""Rows are divided by their length; there is no way back, and none is needed where the model divides anyway."""


def permute(num_heads: int) -> Change:
    """Rotary halves of each head -> adjacent pairs, the order llama.cpp's interleaved rotary embedding wants."""

    def interleave(t: Tensor) -> Tensor:
        return t.reshape(num_heads, 2, t.shape[0] // num_heads // 2, -1).transpose(1, 2).reshape(t.shape)

    def split(t: Tensor) -> Tensor:
        return t.reshape(num_heads, t.shape[0] // num_heads // 2, 2, -1).transpose(1, 2).reshape(t.shape)

    return Change(_each(interleave), _each(split))


def split_rows(sizes: Sequence[int], changes: Sequence[Change] | None = None) -> Change:
    """One tensor whose rows are those of several GGUF tensors in order, each with a change of its own."""
    inner = changes or [KEEP] * len(sizes)

    def to_gguf(tensors: list[Tensor]) -> list[Tensor]:
        parts = torch.split(tensors[0], list(sizes))
        return [change.to_gguf([part])[0] for change, part in zip(inner, parts, strict=True)]

    def to_hf(tensors: list[Tensor]) -> list[Tensor]:
        return [torch.cat([change.to_hf([part])[0] for change, part in zip(inner, tensors, strict=True)])]

    return Change(to_gguf, to_hf)


def group_rows(groups: int, per_group: int, head: int, parts: Sequence[Change] | None = None) -> Change:
    """Grouped q, k, v: (q * per_group, k, v) for each kv head in turn <-> all q, all k, all v.

    Args:
        groups: number of kv heads.
        per_group: query heads that share one.
        parts: None gives one GGUF tensor [q; k; v]; three changes give three tensors.
    """

    def to_gguf(tensors: list[Tensor]) -> list[Tensor]:
        qkv = tensors[0].reshape(groups, per_group + 2, head, *tensors[0].shape[1:])
        split = [qkv[:, :per_group], qkv[:, per_group], qkv[:, per_group + 1]]
        flat = [part.reshape(-1, *tensors[0].shape[1:]) for part in split]
        if parts is None:
            return [torch.cat(flat)]
        return [change.to_gguf([part])[0] for change, part in zip(parts, flat, strict=True)]

    def to_hf(tensors: list[Tensor]) -> list[Tensor]:
        sizes = [groups * per_group * head, groups * head, groups * head]
        flat: Sequence[Tensor]
        if parts is None:
            flat = torch.split(tensors[0], sizes)
        else:
            flat = [change.to_hf([part])[0] for change, part in zip(parts, tensors, strict=True)]
        rest = flat[0].shape[1:]
        q, k, v = (part.reshape(groups, -1, head, *rest) for part in flat)
        return [torch.cat([q, k, v], dim=1).reshape(-1, *rest)]

    return Change(to_gguf, to_hf)


def interleaved(*, transposed: bool) -> Change:
    """One tensor whose even and odd entries in the last dimension are two GGUF tensors (gpt-oss: gate and up)."""

    def to_gguf(tensors: list[Tensor]) -> list[Tensor]:
        parts = [tensors[0][..., index::2] for index in range(2)]
        return [part.transpose(-1, -2) if transposed else part for part in parts]

    def to_hf(tensors: list[Tensor]) -> list[Tensor]:
        parts = [part.transpose(-1, -2) if transposed else part for part in tensors]
        return [torch.stack(parts, dim=-1).flatten(-2)]

    return Change(to_gguf, to_hf)


def latent_kv(heads: int, nope: int, value: int) -> Change:
    """kv_b_proj [heads * (nope + value), latent] <-> k_b [heads, latent, nope] and v_b [heads, value, latent]."""

    def to_gguf(tensors: list[Tensor]) -> list[Tensor]:
        kv = tensors[0].reshape(heads, nope + value, -1)
        return [kv[:, :nope].transpose(1, 2), kv[:, nope:]]

    def to_hf(tensors: list[Tensor]) -> list[Tensor]:
        k, v = tensors
        return [torch.cat([k.transpose(1, 2), v], dim=1).reshape(heads * (nope + value), -1)]

    return Change(to_gguf, to_hf)
