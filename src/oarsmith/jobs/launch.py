"""Starting a command as several processes: torchrun's agent within this process, one line where it fails."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence

from oarsmith.config.parallel import LaunchKeys
from oarsmith.errors import OarsmithError, StoppedError


class WorkerError(OarsmithError):
    """A process of the run failed."""


def launch(config: LaunchKeys, words: Sequence[str]) -> int:
    """Run ``oarsmith WORDS`` in as many processes as the config says, on this machine's part of the run.

    Raises:
        WorkerError: one of them failed; its own message stands above.
        StoppedError: asked to end (SIGTERM); the processes have saved what they had.
        KeyboardInterrupt: SIGINT.
    """
    # Not at the top: the agent imports PyTorch.
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    low, _, high = config.nnodes.partition(":")
    single = config.nnodes == "1" and config.rdzv_endpoint is None
    # Without it a restarted gloo group finds the addresses of the one before (torch 2.13).
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    threads = max(1, (os.cpu_count() or 1) // config.nproc_per_node)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    settings = LaunchConfig(
        min_nodes=int(low),
        max_nodes=int(high or low),
        nproc_per_node=config.nproc_per_node,
        run_id="oarsmith",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0" if single else str(config.rdzv_endpoint),
        max_restarts=config.max_restarts,
        monitor_interval=0.5,
    )
    # What its agent logs of a failure says less than the process's own words.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        elastic_launch(settings, sys.executable)("-m", "oarsmith", *words)
    except ChildFailedError as error:
        first = min(error.failures.items(), key=lambda item: item[1].timestamp)
        rank, failure = first
        raise WorkerError(
            f"process {rank} of the run ended with status {failure.exitcode}; its own words stand above",
            fix="mend what it says and run the same command again: it goes on from the last complete checkpoint",
        ) from error
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from error
        raise StoppedError(
            "asked to end, and all processes have",
            fix="run the same command again: it goes on from the last complete checkpoint",
        ) from error
    return 0
