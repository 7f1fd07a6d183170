"""Version 2 of KServe's protocol over gRPC, as Triton serves it."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Container, Iterator
from contextlib import AbstractContextManager, aclosing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import anyio
import grpc  # type: ignore[import-untyped]

from oarsmith.errors import ConfigError
from oarsmith.serve.access_log import AccessLog
from oarsmith.serve.callers import Call, current_call
from oarsmith.serve.errors import ApiError, invalid
from oarsmith.serve.kserve import card
from oarsmith.serve.kserve.answer import is_last, is_openai, parts, whole
from oarsmith.serve.kserve.grpc_tensors import read_request, response, stream_error, stream_response
from oarsmith.serve.kserve.messages import DATA_TYPES, SERVICE, message
from oarsmith.serve.kserve.native import Job, of_model, parse, parse_text, prepare
from oarsmith.serve.kserve.replies import error_reply, req_id_in
from oarsmith.serve.kserve.terms import Terms, under_terms
from oarsmith.serve.service import Service

_log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 16 << 20
# Requests of one stream that are worked on; the next ones are read when some of them are done.
_MOST_OF_A_STREAM = 256
_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", 16 << 10),
    # A client that has vanished without a word is found within a minute and a half.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    # Else a second server would share the port with the first.
    ("grpc.so_reuseport", 0),
)
_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}


class Keys(Protocol):
    """Who may ask."""

    def holder(self, token: str | None) -> object:
        """Raises ApiError where the token is no key."""

    def check(self, token: str | None) -> object:
        """The same, and counts a request; raises ApiError where there were too many."""


async def serve_grpc(
    service: Service,
    host: str = "127.0.0.1",
    port: int = 8811,
    *,
    tls: tuple[Path, Path] | None = None,
    keys: Keys | None = None,
    log: AccessLog | None = None,
) -> grpc.aio.Server:
    """Start the server, on the loop that the service's worker was started on; whoever starts it stops it.

    Args:
        tls: files of the certificate (with its chain) and of its private key, in PEM; None: unencrypted.
        keys: who may ask; None: anybody.
        log: gets a line for each call, and for each request of a stream.

    Raises:
        ConfigError: the port cannot be had, or the certificate not be read.
    """
    server = grpc.aio.server(options=_OPTIONS)
    server.add_generic_rpc_handlers((_handler(_Servicer(service), keys, log),))
    place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        if tls is None:
            server.add_insecure_port(place)
        else:
            server.add_secure_port(place, _credentials(*tls))
    except RuntimeError as error:
        raise ConfigError(f"{place} cannot be had for gRPC", where="grpc_port", fix="choose another port") from error
    await server.start()
    return server


def _credentials(certificate: Path, key: Path) -> grpc.ServerCredentials:
    try:
        return grpc.ssl_server_credentials([(key.read_bytes(), certificate.read_bytes())])
    except OSError as error:
        what = f"{error.filename} cannot be read: {error.strerror}"
        raise ConfigError(what, where="tls", fix="give the files of a certificate and of its key") from error


class _Servicer:
    """The methods: a message in, a message out."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def server_live(self, request: Any) -> Any:
        return message("ServerLiveResponse")(live=self._service.worker.alive)

    async def server_ready(self, request: Any) -> Any:
        return message("ServerReadyResponse")(ready=self._service.worker.ready)

    async def model_ready(self, request: Any) -> Any:
        card.adapter(self._service, request.name, request.version)
        return message("ModelReadyResponse")(ready=self._service.worker.ready)

    async def server_metadata(self, request: Any) -> Any:
        return message("ServerMetadataResponse")(**card.server())

    async def model_metadata(self, request: Any) -> Any:
        card.adapter(self._service, request.name, request.version)
        return message("ModelMetadataResponse")(**card.metadata(request.name))

    async def model_config(self, request: Any) -> Any:
        card.adapter(self._service, request.name, request.version)
        config = card.config(request.name)
        for tensor in (*config["input"], *config["output"]):
            tensor["data_type"] = DATA_TYPES[tensor["data_type"]]
        return message("ModelConfigResponse")(config=config)

    async def repository_index(self, request: Any) -> Any:
        return message("RepositoryIndexResponse")(models=card.index(self._service, only_ready=request.ready))

    async def model_infer(self, request: Any) -> Any:
        adapter = card.adapter(self._service, request.model_name, request.model_version)
        text, terms = read_request(request)
        job = await self._job(request, parse_text(text), terms, adapter)
        if job.request.stream:
            raise invalid("ModelInfer gives one reply; use ModelStreamInfer", "stream")
        return response(request, await whole(self._service, job))

    async def replies(self, request: Any, admit: Callable[[], object]) -> AsyncGenerator[Any, None]:
        """What a stream is told of one of its requests, once it is admitted.

        As with the suite's server, what is wrong with the native request is said in the output; what is wrong with the
        tensor around it is the stream's error message.
        """
        try:
            adapter = card.adapter(self._service, request.model_name, request.model_version)
            text, terms = read_request(request)
        except ApiError as error:
            yield stream_error(request, error.message)
            return
        name: str | None = request.id or None
        try:
            body = parse_text(text)
            name = req_id_in(body) or name
            admit()
            job = await self._job(request, body, terms, adapter)
            stream = job.request.stream is not False
            async with aclosing(parts(self._service, job, stream=stream)) as found:
                async for reply in found:
                    # Clients of the suite wait for it.
                    ended = {} if stream or is_openai(job) else {"is_end": 1}
                    yield stream_response(request, {**reply, **ended}, last=is_last(reply))
        except ApiError as error:
            yield stream_response(request, {**error_reply(error, name), "is_end": 1}, last=True)

    async def _job(self, request: Any, body: object, terms: Terms, adapter: str | None) -> Job:
        native = of_model(under_terms(parse(body), terms, request.id), adapter)
        return await prepare(self._service, native, priority=terms.priority)

    async def model_stream_infer(
        self,
        requests: AsyncIterator[Any],
        context: Any,
        admit: Callable[[], object],
        written: Callable[[], AbstractContextManager[None]],
    ) -> None:
        seats, line = anyio.Semaphore(_MOST_OF_A_STREAM), anyio.Lock()

        async def answer(request: Any) -> None:
            try:
                with written():
                    async with aclosing(self.replies(request, admit)) as found:
                        async for reply in found:
                            async with line:
                                await context.write(reply)
            except grpc.aio.InternalError:
                # Nobody is there to read it; that the call is cancelled is told a moment later.
                group.cancel_scope.cancel()
            finally:
                seats.release()

        async with anyio.create_task_group() as group:
            async for request in requests:
                await seats.acquire()
                group.start_soon(answer, request)


def _handler(servicer: _Servicer, keys: Keys | None, log: AccessLog | None) -> grpc.GenericRpcHandler:
    # Probes and clients that look around have no key: they learn nothing but the models' names.
    free = {
        "ServerLive": ("ServerLiveRequest", "ServerLiveResponse", servicer.server_live),
        "ServerReady": ("ServerReadyRequest", "ServerReadyResponse", servicer.server_ready),
        "ModelReady": ("ModelReadyRequest", "ModelReadyResponse", servicer.model_ready),
    }
    held = {
        "ServerMetadata": ("ServerMetadataRequest", "ServerMetadataResponse", servicer.server_metadata),
        "ModelMetadata": ("ModelMetadataRequest", "ModelMetadataResponse", servicer.model_metadata),
        "ModelConfig": ("ModelConfigRequest", "ModelConfigResponse", servicer.model_config),
        "RepositoryIndex": ("RepositoryIndexRequest", "RepositoryIndexResponse", servicer.repository_index),
        "ModelInfer": ("ModelInferRequest", "ModelInferResponse", servicer.model_infer),
    }
    methods = {
        name: grpc.unary_unary_rpc_method_handler(
            _unary(name, method, _door(keys, name, free), log),
            request_deserializer=message(request).FromString,
            response_serializer=message(answer).SerializeToString,
        )
        for name, (request, answer, method) in {**free, **held}.items()
    }
    methods["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(
        _stream(servicer, keys, log),
        request_deserializer=message("ModelInferRequest").FromString,
        response_serializer=message("ModelStreamInferResponse").SerializeToString,
    )
    return grpc.method_handlers_generic_handler(SERVICE, methods)


def _door(keys: Keys | None, name: str, free: Container[str]) -> Callable[[str | None], object] | None:
    """What a method asks of a key; None: nothing. Only what makes work is counted."""
    if keys is None or name in free:
        return None
    return keys.check if name == "ModelInfer" else keys.holder


@contextmanager
def _written(log: AccessLog | None, method: str, context: Any) -> Iterator[None]:
    """Within it runs one request, which gets its line in the log."""
    call, began, status = Call(uuid.uuid4().hex), time.monotonic(), 0
    call.keep_text = log is not None and log.prompts
    current_call.set(call)
    try:
        yield
        status = 200
    except ApiError as error:
        status = error.status
        raise
    except Exception:
        status = 500
        raise
    finally:
        if log is not None:
            # "ipv4:127.0.0.1:5000"
            client = context.peer().partition(":")[2].rpartition(":")[0]
            log.write({"method": "gRPC", "path": f"/{SERVICE}/{method}", "client": (client,)}, call, status, began)


def _unary(
    name: str,
    method: Callable[[Any], Awaitable[Any]],
    door: Callable[[str | None], object] | None,
    log: AccessLog | None,
) -> Callable[[Any, Any], Awaitable[Any]]:
    async def handle(request: Any, context: Any) -> Any:
        try:
            with _written(log, name, context):
                if door is not None:
                    door(_token(context))
                return await method(request)
        except ApiError as error:
            return await context.abort(_CODES.get(error.status, grpc.StatusCode.INTERNAL), error.message)
        except Exception as error:
            await _fault(context, error)
            raise

    return handle


def _stream(
    servicer: _Servicer, keys: Keys | None, log: AccessLog | None
) -> Callable[[AsyncIterator[Any], Any], Awaitable[None]]:
    async def handle(requests: AsyncIterator[Any], context: Any) -> None:
        try:
            token = _token(context)
            if keys is not None:
                keys.holder(token)
            # Each request is counted by itself; its task has a context of its own, where the caller is noted.
            written = partial(_written, log, "ModelStreamInfer", context)
            await servicer.model_stream_infer(requests, context, lambda: keys and keys.check(token), written)
        except ApiError as error:
            await context.abort(_CODES.get(error.status, grpc.StatusCode.INTERNAL), error.message)
        except Exception as error:
            await _fault(context, error)
            raise

    return handle


async def _fault(context: Any, error: Exception) -> None:
    """End a call without telling the client what only the log should hold."""
    _log.error("a gRPC call failed", exc_info=error)
    await context.abort(grpc.StatusCode.INTERNAL, "the server has a fault; its log says which")


def _token(context: Any) -> str | None:
    """What a call shows as ``authorization: Bearer ...``."""
    given = dict(context.invocation_metadata() or ()).get("authorization", "")
    kind, _, token = str(given).partition(" ")
    return token.strip() if kind.lower() == "bearer" and token else None
