"""The paths of OpenAI's API."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body
from pydantic import Discriminator, Tag
from starlette.requests import Request
from starlette.responses import Response

from oarsmith.serve.kserve.answer import answer_native
from oarsmith.serve.kserve.native import NativeRequest
from oarsmith.serve.openai import listing
from oarsmith.serve.openai.chat import chat
from oarsmith.serve.openai.completions import complete
from oarsmith.serve.openai.legacy import OldChatRequest, old_chat
from oarsmith.serve.openai.responses import ResponsesRequest, respond
from oarsmith.serve.openai.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from oarsmith.serve.service import Service
from oarsmith.serve.watch import while_wanted

_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "the request cannot be answered as it is"},
    404: {"description": "no such model"},
    429: {"description": "too many requests"},
    503: {"description": "the server is ending"},
    504: {"description": "the answer took too long"},
}


_STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"application/json": {}, "text/event-stream": {}}}}
# A native request is streamed in lines.
_ANY_FORM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {}, "text/event-stream": {}, "application/x-ndjson": {}}}
}
_LINES: dict[int | str, dict[str, Any]] = {200: {"content": {"application/x-ndjson": {}}}}


def _kind(body: Any) -> str:
    native = isinstance(body, NativeRequest) or (isinstance(body, dict) and {"text", "input_ids"} & set(body))
    return "native" if native else "openai"


# What is neither OpenAI's nor the old Flask server's is a native request of the old Triton server.
ChatBody = Annotated[
    Annotated[ChatRequest, Tag("openai")] | Annotated[NativeRequest, Tag("native")], Discriminator(_kind), Body()
]


def router(service: Service) -> APIRouter:
    """OpenAI's routes, and the old Flask server's."""
    routes = APIRouter(responses=_ERRORS)

    @routes.post("/v1/chat/completions", response_model=None, responses=_ANY_FORM)
    async def chat_completions(request: Request, body: ChatBody) -> Response:
        if isinstance(body, NativeRequest):
            return await answer_native(service, body.model_dump(exclude_unset=True), request)
        return await chat(service, request, body)

    @routes.post("/v1/completions", response_model=None, responses=_STREAMED)
    async def completions(request: Request, body: CompletionRequest) -> Response:
        return await complete(service, request, body)

    @routes.post("/v1/responses", response_model=None, responses=_STREAMED)
    async def responses(request: Request, body: ResponsesRequest) -> Response:
        return await respond(service, request, body)

    @routes.post("/v1/embeddings")
    async def embeddings(request: Request, body: EmbeddingRequest) -> dict[str, Any]:
        return await while_wanted(service, request, listing.embed(service, body))

    @routes.get("/v1/models")
    async def models() -> dict[str, Any]:
        return listing.list_models(service)

    @routes.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        return listing.card(service, model)

    @routes.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        return await listing.tokenize(service, body)

    @routes.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        return listing.detokenize(service, body)

    @routes.post("/api/chat", response_model=None, responses=_LINES)
    async def old(request: Request, body: OldChatRequest) -> Response:
        return await old_chat(service, request, body)

    return routes
