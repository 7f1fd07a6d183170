"""``oarsmith serve``: a model behind HTTP, gRPC and a page."""

from __future__ import annotations

import functools
import importlib
import ipaddress
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oarsmith.config.resolved import Resolved
from oarsmith.config.serve import ServeConfig
from oarsmith.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    from oarsmith.engine import Engine
    from oarsmith.serve.access_log import AccessLog
    from oarsmith.serve.keys import Keys
    from oarsmith.serve.service import Service, Steps

_NEEDED = {"fastapi": "fastapi", "uvicorn": "uvicorn", "prometheus_client": "prometheus-client"}
_UI_KEY = "OARSMITH_API_KEY"


def run(resolved: Resolved[ServeConfig]) -> int:
    """The command."""
    config = resolved.config
    _require(config)
    if config.new_api_key is not None:
        return _make_key(config.new_api_key)
    if not config.model_name_or_path:
        raise ConfigError("no model is given", where="model_name_or_path", fix="oarsmith serve MODEL")
    _warn(config)
    if config.replicas > 1:
        return _replicas(config)
    return _serve(config)


def _require(config: ServeConfig) -> None:
    for module, package in _NEEDED.items():
        if find_spec(module) is None:
            raise MissingExtraError(package, "serve", "oarsmith serve")
    if config.ui_port is not None and find_spec("gradio") is None:
        raise MissingExtraError("gradio", "ui", "ui_port")
    if config.grpc_port is not None:
        from oarsmith.serve.kserve import require_grpc

        require_grpc()
    if config.replicas > 1:
        for name in ("ui_port", "grpc_port"):
            if dict(config)[name] is not None:
                raise ConfigError(f"{name} goes with one engine only", where=name, fix="leave it out, or replicas")
        from oarsmith.serve.replicas import require_ray

        require_ray()


def _make_key(name: str) -> int:
    from oarsmith.serve.keys import new_key

    key, line = new_key(name)
    print(f"The key, which is kept nowhere and not shown again:\n  {key}", file=sys.stderr)
    print("Its line for the file that --api_keys names:", file=sys.stderr)
    print(line)
    return 0


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _warn(config: ServeConfig) -> None:
    if _is_loopback(config.host):
        return
    if config.api_keys is None:
        print(
            f"WARNING: {config.host} is open to others without API keys: whoever reaches it can use the model.\n"
            "         Make one with 'oarsmith serve --new_api_key NAME' and give its file as --api_keys.",
            file=sys.stderr,
        )
    elif config.tls_certfile is None:
        print("note: API keys go unencrypted; give tls_certfile, or put a proxy with TLS before it", file=sys.stderr)


def make_service(config: ServeConfig, num_threads: int | None = None) -> Service:
    """The engine with its worker and limits."""
    from oarsmith.jobs.ask import open_engine
    from oarsmith.model_path import resolve
    from oarsmith.serve.defaults import read_defaults
    from oarsmith.serve.service import OPENAI_DEFAULTS, Limits, Service
    from oarsmith.serve.worker import Worker

    defaults = OPENAI_DEFAULTS
    if config.generation_config == "auto":
        defaults = read_defaults(resolve(config.model_name_or_path).base)
    adapters = config.adapter_folders
    name = config.served_model_name or Path(config.model_name_or_path).resolve().name
    if name in adapters:
        raise ConfigError(f"the model and an adapter are both named {name!r}", where="adapters", fix="rename one")
    if num_threads is not None:
        config = config.model_copy(update={"num_threads": num_threads})
    engine = open_engine(config, config.batch_size, adapters)
    if engine.tokenizer is None:
        raise ConfigError(
            "the model has no tokenizer", where=config.model_name_or_path, fix="give tokenizer_name_or_path"
        )
    steps = make_steps(config, engine)
    limits = Limits(
        max_prompt_tokens=config.max_prompt_tokens,
        max_new_tokens=config.max_new_tokens,
        max_answers=config.max_answers,
        seconds=config.request_seconds,
    )
    worker = Worker(engine, max_waiting=config.max_waiting)
    return Service(worker, name, tuple(adapters), limits, defaults, steps)


def make_steps(config: ServeConfig, engine: Engine) -> Steps | None:
    """How steps of answers are judged, where the model is to do that."""
    if not config.process_reward:
        return None
    if engine.num_scores is not None:
        what = "the model scores whole answers; process rewards are of a model that writes"
        raise ConfigError(what, where="process_reward", fix="set it to false")
    from oarsmith.jobs.reward_tokens import reward_ids
    from oarsmith.serve.service import Steps

    assert engine.tokenizer is not None, "refused before"
    return Steps(separator=config.step_separator, reward_tokens=reward_ids(config, engine.tokenizer))


def make_app(config: ServeConfig, service: Service, keys: Keys | None) -> Any:
    """Every protocol on the service, behind the gate."""
    from oarsmith.serve import gate, health, metrics, openai, scores
    from oarsmith.serve.app import create_app
    from oarsmith.serve.kserve import http as kserve

    measured = metrics.Metrics(service)
    routers = [health.router(service), openai.router(service), scores.router(service), kserve.router(service)]
    if config.metrics != "off":
        routers.append(metrics.router(measured))
    rules = gate.Rules(
        max_body_bytes=config.max_body_bytes,
        body_seconds=config.body_seconds,
        open_metrics=config.metrics == "open",
        cors_origins=config.cors_origins,
    )
    log = _log_of(config, service)
    app = create_app(service, routers, grace_seconds=config.grace_seconds)
    # As the application's outermost layer, so that Ray Serve gets an application too.
    app.add_middleware(functools.partial(gate.guarded, rules=rules, keys=keys, metrics=measured, log=log))
    return app


def _log_of(config: ServeConfig, service: Service) -> AccessLog | None:
    from oarsmith.serve.access_log import AccessLog

    return AccessLog(service, prompts=config.log_prompts) if config.log_requests else None


def _keys(config: ServeConfig) -> Keys | None:
    from oarsmith.serve.keys import Keys

    return None if config.api_keys is None else Keys(config.api_keys)


def _serve(config: ServeConfig) -> int:
    from oarsmith.jobs.ask import answering
    from oarsmith.serve import server

    place = server.Place(host=config.host, port=config.port, certfile=config.tls_certfile, keyfile=config.tls_keyfile)
    # Everything that can be wrong is found out before the model is loaded.
    server.check_certificate(place)
    keys = _keys(config)
    with server.take_port(place) as port, answering(config):
        place = server.Place(
            host=place.host, port=port.getsockname()[1], certfile=place.certfile, keyfile=place.keyfile
        )
        print(f"loading {config.model_name_or_path}", file=sys.stderr, flush=True)
        service = make_service(config)
        app = make_app(config, service, keys)
        server.log_to_stderr()

        @asynccontextmanager
        async def beside() -> AsyncIterator[None]:
            grpc = await _start_grpc(config, service, keys)
            ui = await _start_ui(config, service, place.url)
            engine = service.worker.engine
            names = ", ".join(service.model_names)
            print(
                f"{names}: {engine.how}; context {engine.context_length} tokens; {config.batch_size} at once\n"
                f"listening on {place.url}" + "".join(f", {part}" for part in _others(config)),
                file=sys.stderr,
                flush=True,
            )
            try:
                yield
            finally:
                if ui is not None:
                    ui.close()
                if grpc is not None:
                    await grpc.stop(1.0)

        return server.run(
            app,
            service.worker,
            place,
            port,
            grace_seconds=config.grace_seconds,
            beside=beside,
            on_hangup=keys.reload if keys is not None else lambda: None,
        )


def _others(config: ServeConfig) -> list[str]:
    found = [] if config.grpc_port is None else [f"gRPC on port {config.grpc_port}"]
    return found if config.ui_port is None else [*found, f"page on port {config.ui_port}"]


async def _start_grpc(config: ServeConfig, service: Service, keys: Keys | None) -> Any:
    if config.grpc_port is None:
        return None
    from oarsmith.serve.kserve.grpc_server import serve_grpc

    files = (config.tls_certfile, config.tls_keyfile)
    tls = None if files[0] is None or files[1] is None else (Path(files[0]), Path(files[1]))
    return await serve_grpc(service, config.host, config.grpc_port, tls=tls, keys=keys, log=_log_of(config, service))


async def _start_ui(config: ServeConfig, service: Service, url: str) -> Any:
    if config.ui_port is None:
        return None
    import anyio.to_thread

    ui = importlib.import_module("oarsmith.serve.ui")
    # Where keys are needed the page has one of its own, from the environment.
    launch = functools.partial(
        ui.launch,
        url.replace("//0.0.0.0:", "//127.0.0.1:"),
        host=config.host,
        port=config.ui_port,
        api_key=os.environ.get(_UI_KEY),
        title=service.name,
    )
    return await anyio.to_thread.run_sync(launch)


def build_replica(config: ServeConfig, num_threads: int) -> Any:
    """The application of one replica, in its process."""
    return make_app(config, make_service(config, num_threads), _keys(config))


def _replicas(config: ServeConfig) -> int:
    from oarsmith.serve import server
    from oarsmith.serve.replicas import Replicas, serve_replicas

    place = server.Place(host=config.host, port=config.port, certfile=config.tls_certfile, keyfile=config.tls_keyfile)
    server.check_certificate(place)
    server.take_port(place).close()
    _keys(config)
    return serve_replicas(
        Replicas(
            build=functools.partial(build_replica, config),
            count=config.replicas,
            host=config.host,
            port=config.port,
            num_threads=config.num_threads,
            gpus=1.0 if config.device == "cuda" else 0.0,
            grace_seconds=config.grace_seconds,
            certfile=config.tls_certfile,
            keyfile=config.tls_keyfile,
        )
    )
