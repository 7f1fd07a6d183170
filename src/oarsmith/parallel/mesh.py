"""The processes of a run as a mesh of axes, each with its group.

From the outermost axis to the innermost: ``replicate`` (whole copies), ``shard`` (parameters, gradients and states
split, FSDP). Neighbouring ranks, which sit in one machine, share the innermost axis: it communicates most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from oarsmith.errors import ConfigError

AXES = ("replicate", "shard")
Stage = Literal["none", "stage1", "stage2", "stage3"]


@dataclass(frozen=True, kw_only=True)
class Degrees:
    """How many processes each axis has; their product is the number of processes."""

    replicate: int = 1
    shard: int = 1

    @property
    def world_size(self) -> int:
        return self.replicate * self.shard

    def describe(self) -> str:
        """The axes that split something, in words."""
        copies = f"{self.replicate} copies" if self.replicate > 1 else ""
        parts = f"sharded over {self.shard}" if self.shard > 1 else ""
        return ", ".join(filter(None, (copies, parts))) or "one process"


@dataclass(frozen=True)
class Mesh:
    """This process's place among all of them; one process needs no ``device_mesh``."""

    degrees: Degrees
    rank: int = 0
    device_mesh: DeviceMesh | None = None

    @property
    def size(self) -> int:
        return self.degrees.world_size

    @property
    def is_main(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_over_shards(self, tensor: Tensor) -> Tensor:
        """The sum over the processes that hold one copy together, in place."""
        assert self.device_mesh is not None, "one process has nothing to split"
        dist.all_reduce(tensor, group=self.device_mesh.get_group("shard"))
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


ALONE = Mesh(Degrees())


def make_mesh(degrees: Degrees, device_type: str) -> Mesh:
    """The mesh of the processes of the default group, whose number the degrees multiply to."""
    assert degrees.world_size == dist.get_world_size(), (degrees, dist.get_world_size())
    shape = (degrees.replicate, degrees.shard)
    return Mesh(degrees, dist.get_rank(), init_device_mesh(device_type, shape, mesh_dim_names=AXES))


def degrees_of(*, world_size: int, stage: Stage, shard: int, replicate: int) -> Degrees:
    """Complete degrees: what is -1 takes what is left, sharding before copies.

    Raises:
        ConfigError: their product is not the number of processes.
    """
    if stage == "none":
        shard = 1
    elif shard == -1:
        shard = world_size // max(replicate, 1)
    copies = world_size // shard if replicate == -1 and shard else replicate
    if shard * copies != world_size:
        raise ConfigError(
            f"sharding_parallel_degree {shard} times data_parallel_degree {copies} is {shard * copies}, but "
            f"{world_size} processes are running",
            where="sharding_parallel_degree, data_parallel_degree",
            fix="set both to -1, or to numbers whose product is that",
        )
    return Degrees(replicate=copies, shard=shard)
