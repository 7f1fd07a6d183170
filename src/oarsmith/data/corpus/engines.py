"""Who makes the shards: this process, a pool of processes, or a Ray cluster. The shards are the same."""

from __future__ import annotations

import importlib.util
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from pathlib import Path

from oarsmith.data.corpus.shard import Counts, Failed, Settings, Shard, make_shard, work
from oarsmith.errors import MissingExtraError, OarsmithError

Done = tuple[Shard, Counts]
Engine = Callable[[Iterable[Shard], Settings, Path], Iterator[Done]]
"""Makes shards in a folder and yields each when it is finished, in any order. Takes a shard only when it has a worker
for it soon, and raises the error of a shard that failed."""


def local_engine(workers: int) -> Engine:
    """`workers` processes on this machine; 1 is the process itself."""

    def here(shards: Iterable[Shard], settings: Settings, folder: Path) -> Iterator[Done]:
        for shard in shards:
            yield shard, make_shard(shard, settings, folder)

    def pool(shards: Iterable[Shard], settings: Settings, folder: Path) -> Iterator[Done]:
        context = multiprocessing.get_context("spawn")  # the tokenizers' thread pools do not survive a fork
        executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
        pending: dict[Future[Counts | Failed], Shard] = {}
        try:
            for shard in shards:
                pending[executor.submit(work, shard, settings, str(folder))] = shard
                if len(pending) >= 2 * workers:
                    yield from _collect(pending)
            while pending:
                yield from _collect(pending)
        except BrokenProcessPool as error:
            raise OarsmithError(
                "a worker process was killed, most likely for want of memory",
                fix="start the command again with fewer workers: finished shards are kept",
            ) from error
        finally:
            executor.shutdown(cancel_futures=True)

    return here if workers == 1 else pool


def _collect(pending: dict[Future[Counts | Failed], Shard]) -> Iterator[Done]:
    done, _ = wait(pending, return_when=FIRST_COMPLETED)
    for future in done:
        yield pending.pop(future), _checked(future.result())


def _checked(result: Counts | Failed) -> Counts:
    if isinstance(result, Failed):
        raise result.error()
    return result


def _start_worker() -> None:
    """A worker uses one core, leaves Ctrl-C to its parent, and ends when that is killed."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def ray_engine(workers: int | None, address: str | None) -> Engine:
    """A Ray cluster; all its machines must see the corpus, the tokenizer and the output folder under the same paths.

    Args:
        workers: shards at a time; None: one a CPU of the cluster.
        address: of a running cluster; None starts one on this machine.

    Raises:
        MissingExtraError: Ray is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise MissingExtraError("ray", "ray", "engine ray")

    def run(shards: Iterable[Shard], settings: Settings, folder: Path) -> Iterator[Done]:
        import ray

        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        start = {"address": address} if address is not None else {"num_cpus": workers, "include_dashboard": False}
        try:
            ray.init(**start, log_to_driver=False, logging_level=logging.ERROR)
        except ConnectionError as error:
            raise OarsmithError(
                f"no Ray cluster answers at {address}: {error}", where="ray_address", fix="check it with 'ray status'"
            ) from error
        try:
            limit = workers or int(ray.cluster_resources()["CPU"])
            task, shared = ray.remote(num_cpus=1)(work), ray.put(settings)
            pending = {}
            for shard in shards:
                pending[task.remote(shard, shared, str(folder.resolve()))] = shard
                while len(pending) >= 2 * limit:
                    finished = ray.wait(list(pending))[0][0]
                    yield pending.pop(finished), _checked(ray.get(finished))
            while pending:
                finished = ray.wait(list(pending))[0][0]
                yield pending.pop(finished), _checked(ray.get(finished))
        finally:
            ray.shutdown()

    return run
