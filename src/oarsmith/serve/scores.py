"""Scores of a reward model: vLLM's ``/pooling``, and PaddleNLP's reward server at ``/``."""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import Field, model_validator
from starlette.requests import Request
from starlette.responses import JSONResponse

from oarsmith.serve.errors import ApiError, invalid
from oarsmith.serve.openai.completions import prompts_of
from oarsmith.serve.openai.mapping import messages_of
from oarsmith.serve.openai.schemas import Message, Strict, Text, TokenIds, Tool
from oarsmith.serve.service import Service
from oarsmith.serve.watch import while_wanted

if TYPE_CHECKING:
    from oarsmith.data.answers import Answered

_MOST = 2048
_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "the request cannot be answered as it is"},
    404: {"description": "no such model"},
    429: {"description": "too many requests"},
    503: {"description": "the server is ending"},
    504: {"description": "the scores took too long"},
}
Texts = Annotated[list[str], Field(min_length=1, max_length=_MOST)]


class PoolingRequest(Strict):
    """``POST /pooling``: texts as they are, or a conversation that ends with the answer to be scored."""

    input: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(min_length=1, max_length=_MOST)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=_MOST)]
        | None
    ) = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    tools: list[Tool] | None = None
    model: str | None = None
    encoding_format: Literal["float"] = "float"
    # The answer is there already, and scores are given as they are.
    add_generation_prompt: Literal[False] = False
    use_activation: Literal[False] | None = None
    user: str | None = None


class RewardRequest(Strict):
    """``POST /``: rendered prompts, reference answers, which say nothing to a model, and the answers to be scored."""

    src: Texts
    response: Texts
    tgt: list[str] | None = None

    @model_validator(mode="after")
    def _as_many(self) -> RewardRequest:
        if len(self.src) != len(self.response):
            raise ValueError(f"src has {len(self.src)} texts and response {len(self.response)}")
        return self


def router(service: Service) -> APIRouter:
    """Both paths. A model that writes answers them with an error."""
    routes = APIRouter(responses=_ERRORS)

    @routes.post("/pooling")
    async def pooling(request: Request, body: PoolingRequest) -> dict[str, Any]:
        return await while_wanted(service, request, _pool(service, body))

    @routes.post("/")
    async def reward(request: Request, body: RewardRequest) -> JSONResponse:
        try:
            scores = await while_wanted(service, request, _reward(service, body))
        except ApiError as error:
            found = {"error_code": error.status, "error_msg": error.message, "score": []}
            return JSONResponse(found, status_code=error.status, headers=error.headers)
        return JSONResponse({"error_code": 0, "error_msg": "", "score": scores})

    return routes


async def _pool(service: Service, body: PoolingRequest) -> dict[str, Any]:
    if service.adapter_of(body.model) is not None:
        raise invalid("scores are the model's own; adapters of requests have none", "model")
    if (body.input is None) == (body.messages is None):
        raise invalid("give either input or messages", "input")
    rows: list[Answered] = []
    if body.messages is not None:
        tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
        told = messages_of(body.messages)
        if service.steps is None:
            rows.append(await service.read_answer(told, tools=tools, param="messages"))
        else:
            rows.append(await service.read_steps(told, tools, "messages"))
    elif service.steps is not None:
        raise invalid("the model judges steps of conversations; give messages", "input")
    elif body.tools is not None:
        raise invalid("tools are a conversation's; texts are read as they are", "tools")
    elif body.input is not None:
        rows += [await service.read_answer(one, param="input") for one in prompts_of(body.input)]
    scores, count = await service.score(rows), sum(map(len, rows))
    return {
        "id": f"pool-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": service.name,
        "data": [{"index": n, "object": "pooling", "data": _data(service, of)} for n, of in enumerate(scores)],
        "usage": {"prompt_tokens": count, "total_tokens": count, "completion_tokens": 0},
    }


def _data(service: Service, scores: tuple[float, ...]) -> list[Any]:
    """One score; of steps the probabilities of good and bad."""
    return list(scores) if service.steps is None else [[good, 1 - good] for good in scores]


async def _reward(service: Service, body: RewardRequest) -> list[float]:
    if service.steps is not None:
        raise invalid("the model judges steps; ask /pooling", "response")
    pairs = zip(body.src, body.response, strict=True)
    scores = await service.score([await service.read_reply(prompt, answer) for prompt, answer in pairs])
    return [score for (score,) in scores]
