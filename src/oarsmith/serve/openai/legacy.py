"""Requests as PaddleNLP's Flask server took them."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Annotated, Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import StreamingResponse

from oarsmith.serve.errors import ApiError
from oarsmith.serve.openai.old_names import conversation
from oarsmith.serve.openai.schemas import Count, Share, Strict
from oarsmith.serve.service import Service
from oarsmith.serve.watch import stream


class OldTurn(Strict):
    role: str = "user"
    utterance: str = ""


class OldChatRequest(Strict):
    """``POST /api/chat``."""

    context: Annotated[str, Field(min_length=1)]
    history: list[str | OldTurn] = Field(default_factory=list)
    top_k: Annotated[int, Field(ge=0, lt=2**31)] = 0
    top_p: Share = 0.7
    temperature: Annotated[float, Field(ge=0, le=100)] = 0.95
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    max_length: Count | None = None
    min_length: Annotated[int, Field(ge=0, lt=2**31)] = 1


async def old_chat(service: Service, request: Request, body: OldChatRequest) -> StreamingResponse:
    """A line of JSON for each piece of the answer.

    Raises:
        ApiError: the conversation cannot be answered.
    """
    history = [turn if isinstance(turn, str) else turn.model_dump() for turn in body.history]
    ids = await service.encode(conversation(history, body.context), param="context")
    sampling = service.sampling(
        max_new_tokens=body.max_length,
        min_new_tokens=min(body.min_length, body.max_length or body.min_length),
        top_k=body.top_k,
        top_p=body.top_p,
        temperature=body.temperature,
        repetition_penalty=body.repetition_penalty,
    )

    async def lines() -> AsyncGenerator[bytes, None]:
        answer = service.ask(ids, sampling)
        try:
            async for output in answer:
                if output.error is not None:
                    raise output.error
                if output.text:
                    yield _line({"response": {"role": "bot", "utterance": output.text}})
        finally:
            answer.close()

    return await stream(service, request, lines(), failed=_failed, end=b"", media_type="application/x-ndjson")


def _failed(error: ApiError) -> bytes:
    return json.dumps({"error_code": 1, "error_msg": error.message}, ensure_ascii=False).encode() + b"\n"


def _line(result: dict[str, Any]) -> bytes:
    value = {"error_code": 0, "error_msg": "Success", "result": result}
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"
