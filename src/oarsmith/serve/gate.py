"""What every HTTP request passes first: its id, its key, the size and pace of its body; and the log behind it.

It is plain ASGI: responses go through as they come, so streams stay streams.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import anyio
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from oarsmith.serve.access_log import AccessLog
from oarsmith.serve.callers import Call, current_call
from oarsmith.serve.errors import ApiError
from oarsmith.serve.keys import Keys
from oarsmith.serve.metrics import Metrics

_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# Of a request that is refused so much more is read, for a client that still writes does not see the answer.
_LINGER_BYTES, _LINGER_SECONDS = 32 << 20, 2.0
_PROBES = re.compile(r"/(health|ready|version|v2/health/(live|ready))/?")
_SECURITY = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What the gate lets through.

    Args:
        max_body_bytes: of a request.
        body_seconds: that a client may take to send it.
        open_metrics: whether /metrics needs no key.
        cors_origins: of web pages that may ask; "*": any.
    """

    max_body_bytes: int = 8 << 20
    body_seconds: float = 30.0
    open_metrics: bool = True
    cors_origins: tuple[str, ...] = ()


def guarded(
    app: ASGIApp,
    rules: Rules | None = None,
    *,
    keys: Keys | None = None,
    metrics: Metrics | None = None,
    log: AccessLog | None = None,
) -> ASGIApp:
    """The application behind its gate."""
    rules = rules or Rules()
    gate: ASGIApp = Gate(app, rules, keys, metrics, log)
    if not rules.cors_origins:
        return gate
    # Outside: a browser asks for permission without a key, and reads errors only with these headers.
    return CORSMiddleware(
        gate,
        allow_origins=rules.cors_origins,
        allow_methods=("GET", "POST"),
        allow_headers=("Authorization", "Content-Type", "X-Request-Id"),
        expose_headers=("X-Request-Id", "Retry-After"),
    )


class _GoneError(Exception):
    """The client left before it had sent its request."""


class Gate:
    """See the module."""

    def __init__(
        self, app: ASGIApp, rules: Rules, keys: Keys | None, metrics: Metrics | None, log: AccessLog | None
    ) -> None:
        self._app, self._rules, self._keys, self._metrics, self._log = app, rules, keys, metrics, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, began = Headers(scope=scope), time.monotonic()
        given = headers.get("x-request-id", "")
        call = Call(given if _ID.fullmatch(given) else uuid.uuid4().hex)
        call.keep_text = self._log is not None and self._log.prompts
        current_call.set(call)
        scope.setdefault("state", {})["request_id"] = call.id
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                _add_headers(message, call.id)
            await send(message)

        try:
            await self._pass(scope, headers, receive, answer)
        except _GoneError:
            pass
        finally:
            if self._metrics is not None:
                self._metrics.count(_endpoint(scope), _method(scope), status)
            if self._log is not None:
                self._log.write(scope, call, status, began)

    async def _pass(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> None:
        try:
            self._admit(scope["path"], headers)
            body = await self._body(headers, receive)
        except ApiError as error:
            # What may be left of the body is not read, so the connection is of no more use.
            await _linger(receive)
            response_headers = {**error.headers, "Connection": "close"}
            response = JSONResponse(error.body(), status_code=error.status, headers=response_headers)
            await response(scope, receive, send)
            return
        told = False

        async def receive_again() -> Message:
            nonlocal told
            if told:
                return await receive()
            told = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, receive_again, send)

    def _admit(self, path: str, headers: Headers) -> None:
        if self._keys is None or _PROBES.fullmatch(path) or (path == "/metrics" and self._rules.open_metrics):
            return
        scheme, _, token = headers.get("authorization", "").partition(" ")
        self._keys.check(token.strip() if scheme.lower() == "bearer" else None)

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        """The whole body, which has a limit also where no length is given."""
        most, length = self._rules.max_body_bytes, headers.get("content-length", "0")
        # A length that is no number has not come through the HTTP parser.
        if len(length) > 18 or int(length) > most:
            raise _too_large(most)
        parts, size = [], 0
        try:
            with anyio.fail_after(self._rules.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _GoneError
                    part = message.get("body", b"")
                    parts.append(part)
                    size += len(part)
                    if size > most:
                        raise _too_large(most)
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError as error:
            seconds = self._rules.body_seconds
            raise ApiError(408, f"the request did not come within {seconds:g} seconds", code="timeout") from error


async def _linger(receive: Receive) -> None:
    """Read on to the request's end, within bounds."""
    size = 0
    with anyio.move_on_after(_LINGER_SECONDS):
        while size < _LINGER_BYTES:
            message = await receive()
            size += len(message.get("body", b""))
            if message["type"] == "http.disconnect" or not message.get("more_body", False):
                return


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the request is larger than {most} bytes", code="request_too_large")


def _add_headers(message: MutableMapping[str, Any], id: str) -> None:
    headers = MutableHeaders(scope=message)
    headers["X-Request-Id"] = id
    for name, value in _SECURITY.items():
        headers.setdefault(name, value)


def _endpoint(scope: Scope) -> str:
    """The route, not the path: names of paths that do not exist would be metrics without end."""
    route = scope.get("route")
    return getattr(route, "path", "none")


def _method(scope: Scope) -> str:
    known = ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH")
    return scope["method"] if scope["method"] in known else "other"
