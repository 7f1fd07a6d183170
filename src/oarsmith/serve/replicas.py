"""One endpoint over several engines: each is a process of its own, which Ray Serve starts, watches and starts again."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from oarsmith.errors import MissingExtraError, OarsmithError

# Ray tells its authors about its use if nothing is said.
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0"}
# A dead process is noticed at once, by its connection; this is for one that hangs.
_HEALTH_SECONDS = 5.0
# A replica has a queue with a limit of its own and refuses what is too much; Ray is not to hold requests back.
_OPEN_AT_ONCE = 100_000
_NAME = "oarsmith"


@dataclass(frozen=True, kw_only=True)
class Replicas:
    """How many, and where they are reached.

    Args:
        build: makes the application of one replica, in the replica's process; a function of a module, or a partial of
            one. It gets the number of threads the replica may use.
        count: of replicas.
        num_threads: of all replicas on this machine together, or of each one on a cluster. None: all cores here, one
            on a cluster.
        gpus: that each replica needs; may be a fraction.
        grace_seconds: how long open requests may go on once the server is told to end.
        certfile: TLS; with its key.
    """

    build: Callable[[int], Any]
    count: int
    host: str = "127.0.0.1"
    port: int = 8011
    num_threads: int | None = None
    gpus: float = 0.0
    grace_seconds: float = 30.0
    certfile: str | None = None
    keyfile: str | None = None


def require_ray() -> None:
    """Raises:
    MissingExtraError: Ray Serve is not installed; before anything is loaded.
    """
    # `ray` alone has the folder `serve`, but not what it imports.
    if find_spec("ray") is None or find_spec("aiohttp_cors") is None or find_spec("httptools") is None:
        raise MissingExtraError("ray[serve]", "ray", "--replicas above 1")


def threads_of_each(replicas: Replicas, *, cluster: bool) -> int:
    """Threads of one replica: the machine's cores are divided, for engines that share cores wait for each other."""
    if cluster:
        return replicas.num_threads or 1
    return max(1, (replicas.num_threads or len(os.sched_getaffinity(0))) // replicas.count)


def serve_replicas(replicas: Replicas) -> int:
    """Serve until SIGTERM or SIGINT; the exit status.

    With RAY_ADDRESS set, replicas run on the machines of that cluster, which all have the model at the same path, and
    every machine takes requests. Otherwise all run on this one.

    Raises:
        MissingExtraError: Ray Serve is not installed.
        OarsmithError: replicas cannot start.
    """
    require_ray()
    os.environ.update(_QUIET)
    ended = threading.Event()
    import ray
    from ray import serve

    cluster = bool(os.environ.get("RAY_ADDRESS"))
    signals = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in signals}
    try:
        _connect(replicas, cluster=cluster)
        # After Ray's own, which would end the process at once.
        for number in signals:
            signal.signal(number, lambda *_: ended.set())
        _start(replicas, cluster=cluster)
        # In pieces: a wait without end is deaf to signals on some systems.
        while not ended.wait(1.0):
            pass
        # Each replica finishes what it has, within its grace; shutdown() alone would cut the answers.
        serve.delete(_NAME)
        return 0
    finally:
        if not cluster:  # whose Serve may have other applications
            serve.shutdown()
        ray.shutdown()
        for number, handler in before.items():
            signal.signal(number, handler)


def _connect(replicas: Replicas, *, cluster: bool) -> None:
    import ray

    settings: dict[str, Any] = {"log_to_driver": True, "configure_logging": False}
    if not cluster:
        # Not the number of cores: replicas must fit, however many are asked for.
        cpus = replicas.count * threads_of_each(replicas, cluster=False) + 1
        settings |= {"num_cpus": cpus, "include_dashboard": False}
    try:
        ray.init(**settings)
    except (RuntimeError, ConnectionError) as error:
        raise OarsmithError(f"Ray could not start: {_reason(error)}", where="replicas") from error


def _start(replicas: Replicas, *, cluster: bool) -> None:
    from ray import serve
    from ray.exceptions import RayError

    try:
        serve.start(
            proxy_location="EveryNode" if cluster else "HeadOnly",
            http_options={
                "host": replicas.host,
                "port": replicas.port,
                "ssl_certfile": replicas.certfile,
                "ssl_keyfile": replicas.keyfile,
            },
        )
        threads = threads_of_each(replicas, cluster=cluster)
        serve.run(_deployment(replicas, threads), name=_NAME, route_prefix="/")
    except (RayError, RuntimeError) as error:
        raise OarsmithError(f"replicas could not start: {_reason(error)}", where="replicas") from error


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


def _deployment(replicas: Replicas, threads: int) -> Any:
    from ray import serve

    build = replicas.build

    def application() -> Any:
        return build(threads)

    options: dict[str, Any] = {
        "name": "replica",
        "num_replicas": replicas.count,
        "max_ongoing_requests": _OPEN_AT_ONCE,
        "health_check_period_s": _HEALTH_SECONDS,
        "health_check_timeout_s": 6 * _HEALTH_SECONDS,
        "graceful_shutdown_wait_loop_s": 0.1,
        "graceful_shutdown_timeout_s": replicas.grace_seconds + 5.0,
        "ray_actor_options": {
            "num_cpus": threads,
            "num_gpus": replicas.gpus,
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(threads), **_QUIET}},
        },
    }
    return serve.deployment(**options)(serve.ingress(application)()).bind()
