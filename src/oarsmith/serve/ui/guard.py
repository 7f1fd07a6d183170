"""What of gradio's own server a browser may reach: what the page needs, and nothing else.

Gradio takes uploads, keeps runs and deep links, and fetches what a message names, whether or not a page asks for it.
"""

from __future__ import annotations

import json
import re
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_PAGE = re.compile(
    r"/|/config/?|/theme\.css|/favicon\.ico|/manifest\.json|/robots\.txt|/(assets|static|svelte)/.+"
    r"|/gradio_api/(startup-events|queue/join|queue/data|cancel|reset/?|heartbeat/[^/]+)"
)
_MAX_BYTES = 4 << 20
# An image in an answer would tell another machine who reads it.
_CSP = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
    "object-src 'none'; frame-src 'none'; base-uri 'self'; form-action 'self'"
)
_HEADERS = [
    (b"content-security-policy", _CSP.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
]


class Guard:
    """Stands before gradio's application."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with 404, 413 or 400."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def protected(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *_HEADERS]}
            await send(message)

        if not _PAGE.fullmatch(scope["path"]):
            await JSONResponse({"detail": "Not Found"}, 404)(scope, receive, protected)
        elif scope["method"] == "POST":
            await self._post(scope, receive, protected)
        else:
            await self._app(scope, receive, protected)

    async def _post(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = b""
        async for piece in Request(scope, receive).stream():
            body += piece
            if len(body) > _MAX_BYTES:
                await JSONResponse({"detail": "The conversation is too long"}, 413)(scope, receive, send)
                return
        if _names_file(body):
            await JSONResponse({"detail": "Messages are text"}, 400)(scope, receive, send)
            return
        sent = False

        async def again() -> Message:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, again, send)


def _names_file(body: bytes) -> bool:
    """Whether a value in it is a file of gradio, which it would read or fetch; and what is no JSON is gradio's."""
    try:
        left: list[Any] = [json.loads(body or b"null")]
    except (ValueError, RecursionError):
        return False
    while left:
        value = left.pop()
        if isinstance(value, dict):
            if "path" in value or value.get("_type") == "gradio.FileData":
                return True
            left.extend(value.values())
        elif isinstance(value, list):
            left.extend(value)
    return False
