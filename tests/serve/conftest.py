"""A real server on loopback for tests: uvicorn in a thread, over a real engine."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import APIRouter

from oarsmith.engine import Engine
from oarsmith.serve.app import create_app
from oarsmith.serve.service import Limits, Service
from oarsmith.serve.worker import Worker

MakeRouter = Callable[[Service], APIRouter]


@dataclass
class Served:
    """A server while a test uses it."""

    url: str
    service: Service
    app: Any
    loop: asyncio.AbstractEventLoop

    def call(self, function: Callable[[Engine], Any]) -> Any:
        """What a function of the engine gives, between two of its steps."""
        work = self.service.worker.call(function)
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)

    def free_pages(self) -> int:
        return self.call(lambda engine: engine.runner.scheduler.pool.num_free)

    def wait_idle(self, seconds: float = 20.0) -> None:
        """Until nothing is open in worker and engine."""
        until = time.monotonic() + seconds
        while self.service.worker.num_open or self.call(lambda engine: engine.busy):
            assert time.monotonic() < until, "the engine still works"
            time.sleep(0.01)


@contextmanager
def serving(
    model: Path,
    routers: Sequence[MakeRouter] = (),
    *,
    name: str = "tiny",
    adapters: dict[str, Path] | None = None,
    limits: Limits | None = None,
    max_waiting: int = 64,
    grace_seconds: float = 2.0,
    wrap: Callable[[Any, Service], Any] = lambda app, service: app,
    **engine: Any,
) -> Iterator[Served]:
    """A server of the model on a free port until the block ends.

    Args:
        routers: functions that make the routers of a service.
        adapters: name -> folder of a LoRA adapter.
        wrap: puts something around the application.
        engine: further options of the engine.
    """
    made = Engine(model, **{"num_threads": 1, "batch_size": 4, **engine}, adapters=adapters or {})
    service = Service(Worker(made, max_waiting=max_waiting), name, tuple(adapters or {}), limits or Limits())
    app = create_app(service, [router(service) for router in routers], grace_seconds=grace_seconds)
    config = uvicorn.Config(wrap(app, service), port=0, log_level="warning", timeout_graceful_shutdown=10)
    server = uvicorn.Server(config)
    loops: list[asyncio.AbstractEventLoop] = []

    async def main() -> None:
        loops.append(asyncio.get_running_loop())
        await server.serve()

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    until = time.monotonic() + 60
    while not server.started:
        assert thread.is_alive() and time.monotonic() < until, "the server did not start"
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Served(f"http://127.0.0.1:{port}", service, app, loops[0])
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server did not end"


@pytest.fixture(scope="session")
def served() -> Callable[..., AbstractContextManager[Served]]:
    """served(model_path, routers=[...], **options) -> context manager of a ``Served``."""
    return serving
