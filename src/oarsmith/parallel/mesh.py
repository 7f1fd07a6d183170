"""The processes of a run as a mesh of axes, each with its group.

From the outermost axis to the innermost: ``replicate`` (whole copies), ``shard`` (parameters, gradients and states
split, FSDP), ``context`` (the tokens of a stream split), ``tensor`` (heads and columns split). Neighbouring ranks,
which sit in one machine, share the innermost axis: it communicates most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from oarsmith.errors import ConfigError

AxisName = Literal["replicate", "shard", "context", "tensor"]
AXES: tuple[AxisName, ...] = ("replicate", "shard", "context", "tensor")
Stage = Literal["none", "stage1", "stage2", "stage3"]


@dataclass(frozen=True, kw_only=True)
class Degrees:
    """How many processes each axis has; their product is the number of processes."""

    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1

    @property
    def world_size(self) -> int:
        size = 1
        for field in fields(self):
            size *= int(getattr(self, field.name))
        return size

    def describe(self) -> str:
        """The axes that split something, in words."""
        words = {
            "replicate": "{} copies",
            "shard": "sharded over {}",
            "context": "context over {}",
            "tensor": "tensors over {}",
        }
        found = [words[axis].format(size) for axis in AXES if (size := int(getattr(self, axis))) > 1]
        return ", ".join(found) or "one process"


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One axis as this process sees it: its place on it, and the group of those that differ in this axis alone."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the axis, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor


@dataclass(frozen=True)
class Mesh:
    """This process's place in all axes. Without other processes every axis has one place and no group."""

    degrees: Degrees
    rank: int
    axes: Mapping[AxisName, Axis]
    device_mesh: DeviceMesh | None = None

    @property
    def size(self) -> int:
        return self.degrees.world_size

    @property
    def is_main(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    @property
    def data_size(self) -> int:
        """How many ways the batches of a step are dealt out."""
        return self.degrees.replicate * self.degrees.shard

    @property
    def data_rank(self) -> int:
        return self.axes["replicate"].rank * self.degrees.shard + self.axes["shard"].rank

    def sum(self, tensor: Tensor, *names: AxisName) -> Tensor:
        """The sum over some axes, in place."""
        for name in names:
            self.axes[name].sum(tensor)
        return tensor

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process does what is inside before the others do: they find what it has left on the disk."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()

    def once(self, work: Callable[[], object]) -> None:
        """The main process does it while the others wait."""
        if self.is_main:
            work()
        self.barrier()

    def barrier(self) -> None:
        """Wait for everybody."""
        if self.size > 1:
            dist.barrier()


ALONE = Mesh(Degrees(), 0, {name: Axis() for name in AXES})


def make_mesh(degrees: Degrees, device_type: str) -> Mesh:
    """The mesh of the processes of the default group.

    Raises:
        ConfigError: the degrees do not multiply to the number of processes.
    """
    world = dist.get_world_size()
    if degrees.world_size != world:
        raise ConfigError(
            f"the axes ({degrees.describe()}) take {degrees.world_size} processes, {world} are running",
            where="tensor_parallel_degree, sharding_parallel_degree, ...",
            fix="start as many processes as the degrees multiply to, or leave sharding_parallel_degree and "
            "data_parallel_degree at -1",
        )
    shape = tuple(int(getattr(degrees, name)) for name in AXES)
    device_mesh = init_device_mesh(device_type, shape, mesh_dim_names=AXES)
    axes = {
        name: Axis(rank=device_mesh.get_local_rank(name), size=size, group=device_mesh.get_group(name))
        for name, size in zip(AXES, shape, strict=True)
    }
    return Mesh(degrees, dist.get_rank(), axes, device_mesh)


def degrees_of(*, world_size: int, stage: Stage, shard: int, replicate: int, context: int, tensor: int) -> Degrees:
    """Complete degrees: what is -1 takes what is left, sharding before copies.

    Raises:
        ConfigError: they do not divide the number of processes.
    """
    fixed = context * tensor
    if world_size % fixed:
        raise ConfigError(
            f"{world_size} processes cannot be split over tensors ({tensor}) times context ({context})",
            where="tensor_parallel_degree, context_parallel_degree",
            fix=f"start a multiple of {fixed} processes, or lower the degrees",
        )
    left = world_size // fixed
    if stage == "none":
        shard = 1
    elif shard == -1:
        shard = left // max(replicate, 1)
    copies = left // shard if replicate == -1 else replicate
    if shard < 1 or shard * copies != left:
        raise ConfigError(
            f"{left} processes are left for data, but sharding_parallel_degree {shard} times data_parallel_degree "
            f"{copies} is {shard * copies}",
            where="sharding_parallel_degree, data_parallel_degree",
            fix="set both to -1, or to numbers whose product is that",
        )
    return Degrees(replicate=copies, shard=shard, context=context, tensor=tensor)


def device_of(local_rank: int, kind: str) -> torch.device:
    """The device of a process on its machine."""
    return torch.device("cuda", local_rank) if kind == "cuda" else torch.device("cpu")
