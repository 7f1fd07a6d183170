"""Version 2 of KServe's protocol over HTTP, with Triton's binary tensors, ``generate`` and its repository's index."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response, StreamingResponse

from oarsmith.errors import OarsmithError
from oarsmith.serve.errors import ApiError, from_oarsmith, invalid
from oarsmith.serve.kserve import card
from oarsmith.serve.kserve.answer import begin, parts, whole
from oarsmith.serve.kserve.generate import Generate
from oarsmith.serve.kserve.infer import HEADER_LENGTH, Header, Infer, read_body
from oarsmith.serve.kserve.native import MODEL_ALIAS, NativeRequest, of_model, parse_text, prepare
from oarsmith.serve.kserve.openapi import ANSWERS, HEALTH, RESPONSES, Error, body
from oarsmith.serve.kserve.replies import as_json
from oarsmith.serve.service import Service
from oarsmith.serve.watch import while_wanted

_TEXT = {"type": "string"}
_GENERATE = body(NativeRequest, text_input=_TEXT, id=_TEXT, parameters={"type": "object"}, IN=_TEXT, stop=_TEXT)


Name = Annotated[str, Path(examples=[MODEL_ALIAS])]


def _version(request: Request) -> str:
    """Of the path, where it has one; a parameter of the function would also be one of the query."""
    return str(request.path_params.get("version", ""))


Version = Annotated[str, Depends(_version)]
# The paths of a model, and what there is to say of their parameters beside its name.
_VERSION = {"name": "version", "in": "path", "required": True, "schema": {"type": "string", "examples": [card.VERSION]}}
_PLACES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/models/{name}", {}),
    ("/models/{name}/versions/{version}", {"parameters": [_VERSION]}),
)


class _Route(APIRoute):
    """Errors as the protocol has them: ``{"error": "..."}``."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await handler(request)
            except ApiError as error:
                return _error(error)
            except OarsmithError as error:
                return _error(from_oarsmith(error))
            except HTTPException as error:
                return _error(ApiError(error.status_code, str(error.detail)))
            except RequestValidationError as error:
                first = error.errors()[0]
                return _error(invalid(f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"))

        return handle


def _error(error: ApiError) -> JSONResponse:
    return JSONResponse({"error": error.message}, error.status, error.headers)


def _unstreamed(request: NativeRequest) -> NativeRequest:
    if request.stream:
        raise invalid("this place gives one reply; use generate_stream, or ModelStreamInfer of gRPC", "stream")
    return request


def router(service: Service) -> APIRouter:
    """The routes under ``/v2``."""
    routes = APIRouter(prefix="/v2", route_class=_Route, tags=["KServe v2"])
    _add_server(routes, service)
    _add_models(routes, service)
    _add_answers(routes, service)
    return routes


def _add_server(routes: APIRouter, service: Service) -> None:
    @routes.get("", summary="The server's metadata")
    async def server() -> Any:
        return card.server()

    @routes.get(
        "/health/live", response_class=Response, responses=HEALTH, summary="Whether the engine can still answer"
    )
    async def live() -> Response:
        return Response(status_code=200 if service.worker.alive else 503)

    @routes.get(
        "/health/ready", response_class=Response, responses=HEALTH, summary="Whether a new request would be taken"
    )
    async def ready() -> Response:
        return Response(status_code=200 if service.worker.ready else 503)

    @routes.post("/repository/index", responses={400: {"model": Error}}, summary="The models that are there")
    async def index(request: Request) -> Any:
        data = await request.body()
        wanted = parse_text(data) if data else {}
        if not isinstance(wanted, dict) or not isinstance(wanted.get("ready", False), bool):
            raise invalid('the request must be a JSON object; "ready" is true or false', "ready")
        return card.index(service, only_ready=wanted.get("ready", False))


def _add_models(routes: APIRouter, service: Service) -> None:
    for place, more in _PLACES:

        @routes.get(place, responses=RESPONSES, openapi_extra=more, summary="A model's metadata")
        async def metadata(name: Name, version: Version) -> Any:
            card.adapter(service, name, version)
            return card.metadata(name)

        @routes.get(f"{place}/config", responses=RESPONSES, openapi_extra=more, summary="A model's configuration")
        async def config(name: Name, version: Version) -> Any:
            card.adapter(service, name, version)
            return card.config(name)

        @routes.get(
            f"{place}/ready",
            response_class=Response,
            responses=RESPONSES | HEALTH,
            openapi_extra=more,
            summary="Whether a model would take a request",
        )
        async def ready(name: Name, version: Version) -> Response:
            card.adapter(service, name, version)
            return Response(status_code=200 if service.worker.ready else 503)


def _add_answers(routes: APIRouter, service: Service) -> None:
    for place, more in _PLACES:

        @routes.post(
            f"{place}/infer", responses=ANSWERS, openapi_extra=body(Header) | more, summary="One reply to one request"
        )
        async def infer(name: Name, request: Request, version: Version) -> Response:
            adapter = card.adapter(service, name, version)
            asked = Infer.read(await read_body(request), request.headers.get(HEADER_LENGTH))
            native = _unstreamed(of_model(asked.native, adapter))
            job = await prepare(service, native, priority=asked.terms.priority)
            data, headers = asked.answer(name, await while_wanted(service, request, whole(service, job)))
            return Response(data, headers=headers)

        @routes.post(
            f"{place}/generate", responses=ANSWERS, openapi_extra=_GENERATE | more, summary="One reply, without tensors"
        )
        async def generate(name: Name, request: Request, version: Version) -> Any:
            adapter = card.adapter(service, name, version)
            asked = Generate.read(parse_text(await read_body(request)))
            job = await prepare(service, _unstreamed(of_model(asked.native, adapter)), raw=asked.raw)
            return asked.answer(name, await while_wanted(service, request, whole(service, job)))

        @routes.post(
            f"{place}/generate_stream",
            response_class=StreamingResponse,
            responses={**ANSWERS, 200: {"content": {"text/event-stream": {}}, "description": "Server-sent events"}},
            openapi_extra=_GENERATE | more,
            summary="Replies as they come, without tensors",
        )
        async def generate_stream(name: Name, request: Request, version: Version) -> Response:
            adapter = card.adapter(service, name, version)
            asked = Generate.read(parse_text(await read_body(request)))
            job = await prepare(service, of_model(asked.native, adapter), raw=asked.raw)
            streamed = job.request.stream is not False
            found = parts(service, job, stream=streamed)
            first = await begin(service, request, found)

            tell = asked.part if streamed else asked.answer

            async def events() -> AsyncIterator[str]:
                async with aclosing(found):
                    yield f"data: {as_json(tell(name, first))}\n\n"
                    try:
                        async for reply in found:
                            yield f"data: {as_json(tell(name, reply))}\n\n"
                    except ApiError as error:
                        yield f"data: {as_json({'error': error.message})}\n\n"

            return StreamingResponse(events(), media_type="text/event-stream")
