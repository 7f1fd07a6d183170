"""Native requests over HTTP: JSON in, JSON or lines of JSON out."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from datetime import datetime, timezone
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from oarsmith.serve.errors import ApiError
from oarsmith.serve.kserve.native import Job, parse, prepare
from oarsmith.serve.kserve.openai_form import OpenAIForm
from oarsmith.serve.kserve.replies import Reply, as_json, error_reply, replies, req_id_in
from oarsmith.serve.service import Service
from oarsmith.serve.watch import while_wanted

T = TypeVar("T")


async def answer_native(service: Service, body: Mapping[str, Any], request: Request) -> Response:
    """The answer to a native request: ``{result, error_msg, error_code, ...}``, or with ``stream`` a line for each
    token. What cannot be answered has the status of HTTP that says so, and the suite's error in it."""
    came = datetime.now(timezone.utc)
    try:
        job = await prepare(service, parse(body))
        extra = {"http_received_time": str(came)} if job.request.benchmark else {}
        if not job.request.stream:
            reply = await while_wanted(service, request, whole(service, job))
            return _json(reply if job.request.response_type == "openai" else {**reply, **extra})
        return await _streamed(service, job, extra, request)
    except ApiError as error:
        return _json({"result": "", **error_reply(error, req_id_in(body))}, error.status, error.headers)


async def whole(service: Service, job: Job) -> Reply:
    """The one reply to a request.

    Raises:
        ApiError: there is none.
    """
    async with aclosing(parts(service, job, stream=False)) as found:
        async for reply in found:
            return reply
    raise AssertionError(job.request.req_id)


async def parts(service: Service, job: Job, *, stream: bool = True) -> AsyncGenerator[Reply, None]:
    """The replies to a request, as it wants them to look.

    Args:
        stream: a reply for each token; else one.

    Raises:
        ApiError: there are none, or no more.
    """
    form = OpenAIForm(job.request, job.adapter or service.name)
    async with aclosing(replies(service, job, stream=stream)) as found:
        async for reply in found:
            if is_openai(job):
                yield form.chunk(reply) if stream else form.whole(reply)
            else:
                yield reply


def is_openai(job: Job) -> bool:
    """Whether the replies are to look like OpenAI's."""
    return job.request.response_type == "openai"


def is_last(reply: Reply) -> bool:
    """Whether no more comes after a reply."""
    told: Mapping[str, Any] = reply["choices"][0] if "choices" in reply else reply
    return told.get("finish_reason") is not None


async def begin(service: Service, request: Request, found: AsyncGenerator[T, None]) -> T:
    """The first of what a stream brings: what is refused at once still gets a status that says so.

    Raises:
        ApiError: there is none, or the client has gone.
    """

    async def first() -> T:
        return await anext(found)

    return await while_wanted(service, request, first())


async def _streamed(service: Service, job: Job, extra: Reply, request: Request) -> Response:
    found = parts(service, job)
    first = await begin(service, request, found)
    openai = is_openai(job)

    def line(reply: Reply) -> str:
        return f"data: {as_json(reply)}\n\n" if openai else as_json(reply) + "\n"

    async def lines() -> AsyncIterator[str]:
        async with aclosing(found):
            yield line(first if openai else {**first, **extra})
            try:
                async for reply in found:
                    yield line(reply if openai else {**reply, **extra})
            except ApiError as error:
                yield line(error.body() if openai else {**error_reply(error, job.request.req_id), "is_end": 1})
            if openai:
                yield "data: [DONE]\n\n"

    return StreamingResponse(lines(), media_type="text/event-stream" if openai else "application/x-ndjson")


def _json(reply: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(as_json(reply), status, headers, "application/json")
