"""``POST /v1/responses``: one text answer, as OpenAI's newer API has it. Nothing is kept between requests."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncGenerator
from itertools import count
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from oarsmith.engine import Sampling
from oarsmith.engine.request import Completion
from oarsmith.serve.errors import ApiError, invalid
from oarsmith.serve.openai.schemas import Count, Share, Strict
from oarsmith.serve.service import Service
from oarsmith.serve.watch import stream, while_wanted


class InputPart(Strict):
    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class InputItem(Strict):
    type: Literal["message"] = "message"
    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | list[InputPart]
    id: str | None = None
    status: str | None = None


class TextFormat(Strict):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(Strict):
    format: TextFormat | None = None


class ResponsesRequest(Strict):
    """Fields that would need a memory or tools on the server are refused; those of accounts change nothing."""

    input: str | Annotated[list[InputItem], Field(min_length=1)]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Share | None = None
    stream: bool = False
    text: TextOptions | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    store: bool | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    truncation: Literal["disabled"] | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None

    @field_validator("store")
    @classmethod
    def _nothing_is_kept(cls, value: bool | None) -> bool | None:
        if value:
            raise ValueError("this server keeps no answers; leave store out")
        return value


async def respond(service: Service, request: Request, body: ResponsesRequest) -> Response:
    """The answer.

    Raises:
        ApiError: there is none.
    """
    adapter = service.adapter_of(body.model)
    ids = await service.encode(_messages(body), param="input")
    values: dict[str, Any] = dict(service.defaults)
    if body.temperature is not None:
        values["temperature"] = body.temperature
    form = None if body.text is None else body.text.format
    if form is not None and form.type != "text":
        if form.type == "json_schema" and form.schema_ is None:
            raise invalid("text.format is json_schema but has no schema", "text.format.schema")
        values |= {"json_object": True} if form.type == "json_object" else {"json_schema": form.schema_}
    if body.top_p is not None:
        values["top_p"] = body.top_p
    sampling = service.sampling(max_new_tokens=body.max_output_tokens, **values)
    await service.prepare(sampling)
    work = _Response(service, body, ids, sampling, adapter)
    if not body.stream:
        return JSONResponse(await while_wanted(service, request, work.whole()))
    return await stream(service, request, work.events(), failed=work.failed, end=b"")


def _messages(body: ResponsesRequest) -> list[dict[str, Any]]:
    found = [] if body.instructions is None else [{"role": "system", "content": body.instructions}]
    if isinstance(body.input, str):
        return [*found, {"role": "user", "content": body.input}]
    for item in body.input:
        text = item.content if isinstance(item.content, str) else "\n".join(part.text for part in item.content)
        found.append({"role": "system" if item.role == "developer" else item.role, "content": text})
    return found


class _Response:
    def __init__(
        self, service: Service, body: ResponsesRequest, ids: list[int], sampling: Sampling, adapter: str | None
    ) -> None:
        self._service, self._ids, self._sampling, self._adapter = service, ids, sampling, adapter
        self._item = f"msg_{secrets.token_hex(12)}"
        self._numbers = count()
        self._head: dict[str, Any] = {
            "id": f"resp_{secrets.token_hex(12)}",
            "object": "response",
            "created_at": int(time.time()),
            "model": body.model or service.name,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "metadata": body.metadata or {},
            "parallel_tool_calls": False,
            "tool_choice": "none",
            "tools": [],
            "error": None,
            "store": False,
        }

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        answer = self._service.ask(self._ids, self._sampling, adapter=self._adapter)
        try:
            return self._done(await answer.completion())
        finally:
            answer.close()

    def _done(self, completion: Completion) -> dict[str, Any]:
        cut = completion.finish_reason == "length"
        usage = {
            "input_tokens": len(self._ids),
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": completion.num_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": len(self._ids) + completion.num_tokens,
        }
        return {
            **self._head,
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": [self._message("incomplete" if cut else "completed", [_part(completion.text)])],
            "usage": usage,
        }

    def _message(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"type": "message", "id": self._item, "status": status, "role": "assistant", "content": content}

    def _event(self, type: str, **fields: Any) -> bytes:
        value = {"type": type, "sequence_number": next(self._numbers), **fields}
        return f"event: {type}\ndata: {json.dumps(value, ensure_ascii=False)}\n\n".encode()

    def failed(self, error: ApiError) -> bytes:
        """The events that end a stream that cannot go on."""
        code = error.code or error.type
        told = self._event("error", code=code, message=error.message, param=error.param)
        response = {
            **self._head,
            "status": "failed",
            "incomplete_details": None,
            "output": [],
            "usage": None,
            # The only code of OpenAI's that says this much.
            "error": {"code": "server_error", "message": error.message},
        }
        return told + self._event("response.failed", response=response)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The events of OpenAI's stream, numbered."""
        event = self._event
        answer = self._service.ask(self._ids, self._sampling, adapter=self._adapter)
        begun = {**self._head, "status": "in_progress", "incomplete_details": None, "output": [], "usage": None}
        where = {"item_id": self._item, "output_index": 0, "content_index": 0}
        try:
            yield event("response.created", response=begun)
            yield event("response.in_progress", response=begun)
            yield event("response.output_item.added", output_index=0, item=self._message("in_progress", []))
            yield event("response.content_part.added", **where, part=_part(""))
            async for output in answer:
                if output.error is not None:
                    raise output.error
                if output.text:
                    yield event("response.output_text.delta", **where, delta=output.text, logprobs=[])
                if output.completion is not None:
                    done = self._done(output.completion)
                    text = output.completion.text
                    yield event("response.output_text.done", **where, text=text, logprobs=[])
                    yield event("response.content_part.done", **where, part=_part(text))
                    yield event("response.output_item.done", output_index=0, item=done["output"][0])
                    yield event(f"response.{done['status']}", response=done)
        finally:
            answer.close()


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
