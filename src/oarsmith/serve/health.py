"""Probes: whether the process is alive, and whether it takes requests."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from oarsmith._version import __version__
from oarsmith.serve.service import Service


def router(service: Service) -> APIRouter:
    """GET /health, /ready and /version. None of them needs a key.

    A full queue is ready: clients are told to come again, and a probe that failed would send them all elsewhere.
    """
    found = APIRouter(tags=["health"])
    worker = service.worker

    @found.get("/health", summary="Whether the engine is alive", responses={503: {"description": "It is not"}})
    async def health() -> JSONResponse:
        return _state("alive" if worker.alive else "dead", worker.alive)

    @found.get("/ready", summary="Whether requests are taken", responses={503: {"description": "They are not"}})
    async def ready() -> JSONResponse:
        word = "ready" if worker.accepting else "ending" if worker.alive else "dead"
        return _state(word, worker.accepting)

    @found.get("/version", summary="The server's version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    return found


def _state(word: str, good: bool) -> JSONResponse:
    return JSONResponse({"status": word}, status_code=200 if good else 503)
