"""A server of two replicas for test_replicas.py: each answer says which process wrote it.

As a script, so that Ray sends its functions along instead of their names: replicas do not see the tests' modules.
"""

import asyncio
import functools
import os
import sys
from collections.abc import AsyncIterator
from typing import Any

from oarsmith.serve.replicas import Replicas, serve_replicas


def build(model: str, threads: int) -> Any:
    from fastapi import APIRouter
    from fastapi.responses import StreamingResponse

    from oarsmith.engine import Engine
    from oarsmith.serve.app import create_app
    from oarsmith.serve.service import Service
    from oarsmith.serve.worker import Worker

    router = APIRouter()
    service = Service(Worker(Engine(model), max_waiting=32), "tiny")

    @router.get("/pid")
    async def pid() -> dict[str, int]:
        return {"pid": os.getpid(), "threads": threads, "open": service.worker.num_open}

    @router.get("/say")
    async def say(tokens: int, pause: float) -> StreamingResponse:
        ids = await service.encode("count")
        answer = service.ask(ids, service.sampling(max_new_tokens=tokens, ignore_eos=True, temperature=0.0))

        async def lines() -> AsyncIterator[str]:
            try:
                yield f"{os.getpid()}\n"
                async for output in answer:
                    await asyncio.sleep(pause)
                    yield "more\n" if output.completion is None else "end\n"
            finally:
                answer.close()

        return StreamingResponse(lines())

    return create_app(service, [router], grace_seconds=20)


if __name__ == "__main__":
    settings = Replicas(build=functools.partial(build, sys.argv[1]), count=2, port=int(sys.argv[2]), grace_seconds=20)
    sys.exit(serve_replicas(settings))
