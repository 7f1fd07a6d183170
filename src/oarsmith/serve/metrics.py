"""Prometheus metrics. Answers are measured where the worker delivers them, so that protocols need no code for it."""

from __future__ import annotations

from collections.abc import Iterator

from fastapi import APIRouter
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector
from starlette.responses import Response

from oarsmith.serve.service import Service
from oarsmith.serve.worker import Answer, Ending

_FIRST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_EACH = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
_WHOLE = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0, 600.0)


class Metrics:
    """What one service has done, in a registry of its own."""

    def __init__(self, service: Service) -> None:
        self._name = service.name
        self.registry = CollectorRegistry()
        made = self.registry
        self._requests = Counter(
            "oarsmith_http_requests", "HTTP requests", ("endpoint", "method", "status"), registry=made
        )
        self._answers = Counter("oarsmith_answers", "Prompts that left the engine", ("model", "ending"), registry=made)
        self._prompt_tokens = Counter("oarsmith_prompt_tokens", "Tokens of prompts", ("model",), registry=made)
        self._tokens = Counter("oarsmith_generated_tokens", "Tokens of answers", ("model",), registry=made)
        self._first = Histogram(
            "oarsmith_time_to_first_token_seconds",
            "From a request to its first token",
            ("model",),
            registry=made,
            buckets=_FIRST,
        )
        self._each = Histogram(
            "oarsmith_time_per_output_token_seconds",
            "Mean of an answer, without the first token",
            ("model",),
            registry=made,
            buckets=_EACH,
        )
        self._whole = Histogram(
            "oarsmith_request_seconds",
            "From a request to the end of its answer",
            ("model",),
            registry=made,
            buckets=_WHOLE,
        )
        self.registry.register(_Engine(service))
        service.worker.on_end = self.observe

    def count(self, endpoint: str, method: str, status: int) -> None:
        """One HTTP request was answered."""
        self._requests.labels(endpoint, method, str(status)).inc()

    def observe(self, answer: Answer, ending: Ending) -> None:
        """An answer has ended."""
        model = answer.adapter or self._name
        self._answers.labels(model, ending).inc()
        self._prompt_tokens.labels(model).inc(len(answer.prompt))
        self._tokens.labels(model).inc(answer.num_tokens)
        if answer.first is None or ending in ("error", "aborted"):
            return
        self._first.labels(model).observe(answer.first - answer.began)
        self._whole.labels(model).observe(answer.last - answer.began)
        if answer.num_tokens > 1:
            self._each.labels(model).observe((answer.last - answer.first) / (answer.num_tokens - 1))

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self.registry)


class _Engine(Collector):
    """The engine's state when somebody looks."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        worker = self._service.worker
        load, slots = worker.load, worker.engine.batch_size
        used = load.num_pages - load.free_pages
        gauges = {
            "oarsmith_requests_running": ("Answers that the engine works on", load.running),
            "oarsmith_requests_waiting": ("Answers that wait for a place", load.waiting),
            "oarsmith_requests_open": ("Prompts that are not finished", worker.num_open),
            "oarsmith_cache_pages": ("Pages of the cache", load.num_pages),
            "oarsmith_cache_free_pages": ("Pages that nobody holds", load.free_pages),
            "oarsmith_engine_alive": ("Whether the engine can answer", int(worker.alive)),
            # As PaddleNLP's server names them.
            "batch_size": ("Answers that the engine works on", load.running),
            "max_batch_size": ("Answers it can work on at the same time", slots),
            "block_num": ("Pages in use", used),
            "max_block_num": ("Pages of the cache", load.num_pages),
            "available_resource": ("Share of the cache's pages that is free", load.free_pages / max(load.num_pages, 1)),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value=value)
        yield CounterMetricFamily("oarsmith_preemptions", "Answers that had to make way for others", load.preempted)
        yield CounterMetricFamily("oarsmith_cached_prompt_tokens", "Tokens found in the cache", load.found_tokens)


def router(metrics: Metrics) -> APIRouter:
    """GET /metrics."""
    found = APIRouter(tags=["metrics"])

    @found.get("/metrics", summary="Metrics for Prometheus", response_class=Response)
    async def read() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return found
