"""The server's life: a port, requests, and an end in good order."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from oarsmith.errors import ConfigError
from oarsmith.serve.access_log import JsonLines
from oarsmith.serve.worker import Worker

_log = logging.getLogger("oarsmith.serve")
# For answers to reach their clients once the engine has given its last one.
_FLUSH_SECONDS = 5.0
_IDLE_SECONDS = 30.0
# For a request's first line and headers to come.
_HEADER_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the server listens.

    Args:
        certfile, keyfile: TLS, in PEM.
    """

    host: str = "127.0.0.1"
    port: int = 8011
    certfile: str | None = None
    keyfile: str | None = None

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.certfile else 'http'}://{host}:{self.port}"


def take_port(place: Place) -> socket.socket:
    """The port, taken before a model is loaded in vain.

    Raises:
        ConfigError: it cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            place.host, place.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        what = f"{place.host}:{place.port} cannot be had: {error.strerror}"
        raise ConfigError(what, where="port", fix="choose another --port or --host") from error
    return found


def check_certificate(place: Place) -> None:
    """Raises:
    ConfigError: there is no certificate with its key.
    """
    if place.certfile is None and place.keyfile is None:
        return
    if place.certfile is None or place.keyfile is None:
        raise ConfigError("TLS needs both files", where="tls_certfile", fix="give tls_certfile and tls_keyfile")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(place.certfile, place.keyfile)
    except OSError as error:  # ssl's errors too
        what = f"the certificate cannot be used: {error.strerror or error}"
        raise ConfigError(what, where="tls_certfile", fix="give a certificate and its key, in PEM") from error


class _Protocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """HTTP, where a connection is closed that takes too long to say what it wants."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._between_requests:
            self._stop()
        elif self._timer is None:
            self._wait()

    @property
    def _between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _wait(self) -> None:
        self._timer = self.loop.call_later(_HEADER_SECONDS, self._late)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        self._timer = None
        if self._between_requests and not self.transport.is_closing():
            self.transport.close()


class _Server(uvicorn.Server):
    """Signals are ours: uvicorn would close its port before the last requests are told anything."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def _nothing() -> AsyncIterator[None]:
    yield


def run(
    app: Any,
    worker: Worker,
    place: Place,
    port: socket.socket,
    *,
    grace_seconds: float,
    beside: Callable[[], AbstractAsyncContextManager[None]] = _nothing,
    on_hangup: Callable[[], None] = lambda: None,
) -> int:
    """Serve until SIGTERM or SIGINT; the exit status.

    Told to end, the server answers new requests with 503, finishes open ones within ``grace_seconds`` and gives up the
    others with an error. A second signal ends it at once. Where the engine dies, every open request gets an error and
    the status is 1, so that a supervisor starts the server again.

    Args:
        port: as ``take_port`` gives it.
        beside: what else runs while requests are taken.
        on_hangup: called at SIGHUP.
    """
    config = uvicorn.Config(
        app,
        http=_Protocol,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        lifespan="on",
        timeout_keep_alive=int(_IDLE_SECONDS),
        timeout_graceful_shutdown=int(_FLUSH_SECONDS),
        ssl_certfile=place.certfile,
        ssl_keyfile=place.keyfile,
    )
    return asyncio.run(_Run(_Server(config), worker, grace_seconds).main(port, beside, on_hangup))


class _Run:
    def __init__(self, server: uvicorn.Server, worker: Worker, grace_seconds: float) -> None:
        self._server, self._worker, self._grace_seconds = server, worker, grace_seconds
        self._status = 0
        self._ending: asyncio.Task[None] | None = None

    async def main(
        self,
        port: socket.socket,
        beside: Callable[[], AbstractAsyncContextManager[None]],
        on_hangup: Callable[[], None],
    ) -> int:
        loop = asyncio.get_running_loop()
        self._worker.on_death = self._died
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._told_to_end, number)
        loop.add_signal_handler(signal.SIGHUP, on_hangup)
        serving = asyncio.create_task(self._server.serve(sockets=[port]))
        while not self._server.started and not serving.done():
            await asyncio.sleep(0.01)
        if serving.done():
            await serving
            return 1
        async with beside():
            await serving
        return self._status

    def _told_to_end(self, number: int) -> None:
        if self._ending is not None:
            sys.stderr.flush()
            os._exit(128 + number)
        _log.info("ending: %d open requests have %g seconds", self._worker.num_open, self._grace_seconds)
        self._ending = asyncio.create_task(self._end())

    async def _end(self) -> None:
        if not await self._worker.close(self._grace_seconds):
            _log.warning("not every request was answered in time")
        # New requests were told to go elsewhere until now; from here on the port is closed.
        self._server.should_exit = True

    def _died(self) -> None:
        _log.critical("the engine has died; its error stands above")
        self._status = 1
        self._server.should_exit = True


def log_to_stderr() -> None:
    """Messages of this server, as lines of JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("oarsmith", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO if name == "oarsmith" else logging.WARNING)
