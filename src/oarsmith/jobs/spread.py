"""From a configuration to its place among several processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from rich.console import Console

from oarsmith import processes
from oarsmith.config.train import TrainConfig
from oarsmith.models.decoder import Decoder
from oarsmith.parallel.mesh import Degrees, Mesh, degrees_of
from oarsmith.parallel.start import joined
from oarsmith.training.ranks import ALONE, Ranks


def degrees(config: TrainConfig) -> Degrees:
    """How the processes that were started together are used.

    Raises:
        ConfigError: their number does not fit the degrees.
    """
    if processes.count() == 1:
        return Degrees()
    return degrees_of(
        world_size=processes.count(),
        stage=config.sharding,
        shard=config.sharding_parallel_degree,
        replicate=config.data_parallel_degree,
    )


def batches_per_step(config: TrainConfig) -> int:
    """Batches of one update, over all processes."""
    return config.gradient_accumulation_steps * degrees(config).world_size


@contextmanager
def spread(config: TrainConfig, device: torch.device) -> Iterator[Mesh]:
    """This process's place in the run's mesh; the group is left at the end."""
    with joined(degrees(config), device, timeout_s=config.ddp_timeout) as mesh:
        yield mesh


def split(config: TrainConfig, model: Decoder, mesh: Mesh, console: Console) -> Ranks:
    """Leave of the model what belongs here; how steps then work with the others."""
    if mesh.size == 1:
        return ALONE
    console.print(f"processes: {mesh.size}, {mesh.degrees.describe()}")
    # Not at the top: FSDP and DTensor take a second to import.
    from oarsmith.parallel.ranks import MeshRanks
    from oarsmith.parallel.shard import shard

    if config.sharding != "none":
        shard(model, mesh, config.sharding)
    return MeshRanks.of(mesh, model, config.sharding)
