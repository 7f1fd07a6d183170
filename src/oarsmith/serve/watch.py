"""Answers are given up when nobody waits for them any more, or for too long."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import StreamingResponse

from oarsmith.errors import OarsmithError
from oarsmith.serve.errors import ApiError, from_oarsmith
from oarsmith.serve.service import Service

T = TypeVar("T")
_CLOSED = 499  # nobody reads it: the client has gone


def too_long(service: Service) -> ApiError:
    """The answer took more time than the server gives."""
    seconds = service.limits.seconds
    return ApiError(504, f"no answer within {seconds:g} seconds; ask for fewer tokens", "server_error", code="timeout")


async def while_wanted(service: Service, request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What the work gives; it is cancelled when the client leaves or time is up.

    Raises:
        ApiError: one of these, or the engine's refusal.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, timeout=service.limits.seconds, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError(_CLOSED, "the client has left") if gone.done() else too_long(service)
    except OarsmithError as error:
        raise from_oarsmith(error) from error
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(0.2)


def event(value: object) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _failed(error: ApiError) -> bytes:
    return event(error.body())


async def stream(
    service: Service,
    request: Request,
    events: AsyncGenerator[bytes, None],
    *,
    failed: Callable[[ApiError], bytes] = _failed,
    end: bytes = b"data: [DONE]\n\n",
    media_type: str = "text/event-stream",
) -> StreamingResponse:
    """A response that sends the events as they come. The first is waited for: what is refused has a status of its own.

    Args:
        failed: how a stream that has begun tells an error.
        end: what follows the last event, also after an error.

    Raises:
        ApiError: the engine refuses the prompt, the client leaves or time is up before anything came.
    """
    loop = asyncio.get_running_loop()
    until = loop.time() + service.limits.seconds

    async def following() -> bytes | None:
        try:
            return await asyncio.wait_for(anext(events), until - loop.time())
        except StopAsyncIteration:
            return None
        except (TimeoutError, asyncio.TimeoutError) as error:
            raise too_long(service) from error
        except OarsmithError as error:
            raise from_oarsmith(error) from error

    first = await while_wanted(service, request, following())

    async def body() -> AsyncIterator[bytes]:
        one = first
        try:
            while one is not None:
                yield one
                one = await following()
        except ApiError as error:
            yield failed(error)
        finally:
            await events.aclose()
        yield end

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(body(), media_type=media_type, headers=headers)
