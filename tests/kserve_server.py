"""A real server of the KServe protocol on loopback: HTTP by uvicorn and gRPC, on one loop in a thread."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from oarsmith.engine import Engine
from oarsmith.serve.app import create_app
from oarsmith.serve.kserve.grpc_server import serve_grpc
from oarsmith.serve.kserve.http import router
from oarsmith.serve.service import Limits, Service
from oarsmith.serve.worker import Worker


@dataclass
class Running:
    """What a test needs of the server."""

    service: Service
    loop: asyncio.AbstractEventLoop
    http: str
    grpc: str

    def call(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)

    def free_pages(self) -> int:
        return self.call(self.service.worker.call(lambda engine: engine.runner.scheduler.pool.num_free))

    def wait_idle(self, seconds: float = 20.0) -> None:
        """Until nothing is open in worker and engine."""
        until = time.monotonic() + seconds
        while self.service.worker.num_open or self.call(self.service.worker.call(lambda engine: engine.busy)):
            assert time.monotonic() < until, "the engine still works"
            time.sleep(0.01)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def running(
    model: Path,
    *,
    limits: Limits | None = None,
    max_waiting: int = 64,
    keys: Any = None,
    more: Callable[[Service], list[Any]] = lambda service: [],
    **engine: Any,
) -> Iterator[Running]:
    """A server with one model until the block ends."""
    started: list[Running] = []
    ready, ports = threading.Event(), (free_port(), free_port())

    async def main() -> None:
        worker = Worker(Engine(model, **engine), max_waiting=max_waiting)
        service = Service(worker, "tiny", tuple(engine.get("adapters", ())), limits or Limits())
        app = create_app(service, [router(service), *more(service)], grace_seconds=1.0)
        server = uvicorn.Server(uvicorn.Config(app, port=ports[0], log_level="warning", timeout_graceful_shutdown=2))
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        grpc_server = await serve_grpc(service, port=ports[1], keys=keys)
        loop = asyncio.get_running_loop()
        started.append(Running(service, loop, f"127.0.0.1:{ports[0]}", f"127.0.0.1:{ports[1]}"))
        ready.set()
        await asyncio.to_thread(ended.wait)
        await grpc_server.stop(1.0)
        server.should_exit = True
        await serving

    ended = threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    try:
        assert ready.wait(60), "the server did not start"
        yield started[0]
    finally:
        ended.set()
        thread.join(30)
        assert not thread.is_alive()
