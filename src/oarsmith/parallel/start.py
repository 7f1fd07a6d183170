"""Joining the other processes of a run, and leaving them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from oarsmith import processes
from oarsmith.parallel.mesh import ALONE, Degrees, Mesh, make_mesh


@contextmanager
def joined(degrees: Degrees, device: torch.device, *, timeout_s: int) -> Iterator[Mesh]:
    """The mesh of all processes that were started together; the group is left at the end.

    Args:
        timeout_s: seconds until waiting for another process is an error.
    """
    if degrees.world_size == 1:
        yield ALONE
        return
    if device.type == "cuda":
        torch.cuda.set_device(processes.local_rank())
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    try:
        mesh = make_mesh(degrees, device.type)
        yield mesh
        # The main process has the store through which others may still be meeting.
        mesh.barrier()
    finally:
        dist.destroy_process_group()
