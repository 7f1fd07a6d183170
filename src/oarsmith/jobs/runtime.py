"""What every computing job does first: threads, kernels, memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from oarsmith import kernels
from oarsmith.config.groups import RuntimeKeys
from oarsmith.kernels.memory import keep_freed_memory
from oarsmith.loading import pick_device


@contextmanager
def runtime(config: RuntimeKeys) -> Iterator[torch.device]:
    """The device to compute on, with threads and kernels set as configured."""
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    keep_freed_memory()
    with kernels.using(config.kernels):
        yield pick_device(config.device)
