"""Which tensor goes where, checked before the first byte is converted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from oarsmith.checkpoint.gguf.arch_llama import EMBEDDING, HEAD
from oarsmith.checkpoint.gguf.links import KEEP, Link, Part, dim_sizes, expand
from oarsmith.checkpoint.gguf.reader import GgufFile, GgufTensor
from oarsmith.checkpoint.gguf.rope import FACTOR_TENSORS
from oarsmith.errors import CheckpointError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ReadPlan:
    """One link of a file: its GGUF tensors, and the Hugging Face tensors they become."""

    link: Link
    sources: tuple[GgufTensor, ...]
    num_experts: int

    def targets(self) -> dict[str, Shape]:
        """Names and shapes of what it makes."""
        if not self.link.per_expert:
            return dict(zip(self.link.hf, _played(self.link, [source.shape for source in self.sources]), strict=True))
        shapes = _played(self.link, [source.shape[1:] for source in self.sources])
        return {name: shape for e in range(self.num_experts) for name, shape in zip(self.names(e), shapes, strict=True)}

    def names(self, expert: int) -> list[str]:
        return [name.replace("{e}", str(expert)) for name in self.link.hf]


def _played(link: Link, shapes: Sequence[Shape]) -> list[Shape]:
    """The shapes a link's Hugging Face side has, found by playing its change on tensors without data."""
    try:
        tensors = link.change.to_hf([torch.empty(shape, device="meta") for shape in shapes])
    except RuntimeError as error:  # how a reshape refuses sizes that do not fit, such as an odd number of rotated rows
        raise CheckpointError(f"shapes {shapes} do not fit what the metadata says", where=link.parts[0].name) from error
    return [tuple(tensor.shape) for tensor in tensors]


def gguf_shapes(link: Link, shapes: Sequence[Shape]) -> list[Shape]:
    """The shapes a link's GGUF side has, for one expert where it has experts."""
    tensors = link.change.to_gguf([torch.empty(shape, device="meta") for shape in shapes])
    return [tuple(tensor.shape) for tensor in tensors]


def has_tied_head(file: GgufFile) -> bool:
    """Whether the output head is the embedding: left out of the file, or stored as the same bytes."""
    head, embedding = file.tensors.get(HEAD), file.tensors.get(EMBEDDING)
    if head is None:
        return True
    if embedding is None or (head.type, head.shape) != (embedding.type, embedding.shape):
        return False
    return file.same_bytes(head, embedding)


def plan_reading(file: GgufFile, links: Iterable[Link], dims: Mapping[str, int], *, tied: bool) -> list[ReadPlan]:
    """Give every tensor of the file its place.

    Args:
        dims: size of each dimension name used in the links.
        tied: leave the output head out.

    Raises:
        CheckpointError: a tensor without a place, a missing or differently shaped one, a bias only some layers have.
    """
    plans: list[ReadPlan] = []
    left = {name: None for name in file.tensors if name not in FACTOR_TENSORS and not (tied and name == HEAD)}
    missing: list[str] = []
    for link in links:
        layers = [item for item in expand(link) if not (tied and item.parts[0].name == HEAD)]
        present = [any(part.name in left for part in item.parts) for item in layers]
        for item, found in zip(layers, present, strict=True):
            older = item.older is not None and item.older.name in left
            if not found and not older and not item.required:
                if any(present):
                    name = next(i.parts[0].name for i, yes in zip(layers, present, strict=True) if yes)
                    raise CheckpointError(f"only some layers have {name}", where=str(file.path))
                continue
            if item.older is not None and older:
                item = replace(item, parts=(item.older,), change=KEEP)
            names = [part.name for part in item.parts]
            missing += [name for name in names if name not in left]
            if all(name in left for name in names):
                for name in names:
                    del left[name]
                sources = tuple(_checked(file, part, dims) for part in item.parts)
                plans.append(ReadPlan(item, sources, dims.get("experts", 0)))
    if left:
        raise CheckpointError(
            f"this architecture has no place for the tensor (model of {dims['layers']} layers)",
            where=f"{file.path}: {next(iter(left))}",
            fix="the file uses a variant this version does not know; please report it",
        )
    if missing:
        raise CheckpointError(
            f"{len(missing)} tensors are missing, first {', '.join(missing[:3])}",
            where=str(file.path),
            fix="the file is incomplete; convert or download the model again",
        )
    return plans


def _checked(file: GgufFile, part: Part, dims: Mapping[str, int]) -> GgufTensor:
    tensor, expected = file.tensors[part.name], dim_sizes(part.shape, dims)
    shape = tensor.shape
    while len(shape) > len(expected) and shape[0] == 1:  # a vector may be stored as a matrix of one row
        shape = shape[1:]
    if shape != expected:
        raise CheckpointError(
            f"shape {tensor.shape}, but the metadata says {part.shape} = {expected}",
            where=f"{file.path}: {part.name}",
            fix="metadata and weights do not belong together; convert or download the model again",
        )
    return replace(tensor, shape=expected)


def read_link(file: GgufFile, plan: ReadPlan, dtype: torch.dtype, expert: int | None = None) -> list[Tensor]:
    """The Hugging Face tensors of a link (of one of its experts) in `dtype`."""
    change = plan.link.change
    # In float32 where it computes: 1 + w has lost w's small bits if rounded to bfloat16 first.
    working = torch.float32 if change.arithmetic else dtype
    tensors = change.to_hf([file.read(source, working, index=expert) for source in plan.sources])
    return [tensor.to(dtype) for tensor in tensors]
