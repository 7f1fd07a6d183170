"""The HTTP application: every protocol's routes on one service."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from fastapi import APIRouter, FastAPI, Request
from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from oarsmith._version import __version__
from oarsmith.errors import OarsmithError
from oarsmith.serve.errors import ApiError, from_oarsmith, invalid
from oarsmith.serve.service import Service

_log = logging.getLogger(__name__)
# What a chat's body may be (openai/routes.py).
KINDS = ("openai", "native")


def create_app(service: Service, routers: Iterable[APIRouter], *, grace_seconds: float = 30.0) -> FastAPI:
    """The application. Its worker runs as long as the application does.

    Args:
        grace_seconds: how long requests that are open may go on once the server is told to end.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        await service.worker.close(grace_seconds)

    app = FastAPI(title="Oarsmith", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    for router in routers:
        app.include_router(router)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(OarsmithError, _oarsmith_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _our_error)
    return app


def _answer(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


async def _api_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return _answer(error)


async def _oarsmith_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, OarsmithError)
    return _answer(from_oarsmith(error))


async def _validation_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    # The place begins with "body" and, where there are several kinds of them, its kind; what was sent is not repeated.
    parts = [str(part) for part in first["loc"][1:]]
    place = ".".join(parts[1:] if parts[:1] and parts[0] in KINDS else parts) or None
    message = jsonable_encoder(first["msg"])
    return _answer(invalid(f"{place}: {message}" if place else str(message), place))


async def _http_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return _answer(ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {})))


async def _our_error(request: Request, _: Exception) -> JSONResponse:
    """A bug: the log has its traceback, the client the number to ask about."""
    id = request.scope.get("state", {}).get("request_id")
    message = "the server made a mistake" + (f"; its log says more about request {id}" if id else "")
    return _answer(ApiError(500, message, "server_error", code="internal_error"))
