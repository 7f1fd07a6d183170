"""What becomes of a native request: replies on their way, or one at the end."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any
from weakref import WeakKeyDictionary

from oarsmith.engine.request import Completion
from oarsmith.engine.ticket import Output
from oarsmith.errors import OarsmithError
from oarsmith.serve.errors import ApiError, from_oarsmith, invalid
from oarsmith.serve.kserve.native import Job
from oarsmith.serve.service import Service
from oarsmith.serve.worker import Worker

Reply = dict[str, Any]

# Names of requests that are open, by the worker that has them.
_open_names: WeakKeyDictionary[Worker, set[str]] = WeakKeyDictionary()


class _LateError(OarsmithError):
    """An answer that was not there in time."""


@contextmanager
def _name_taken(worker: Worker, name: str) -> Iterator[None]:
    names = _open_names.setdefault(worker, set())
    if name in names:
        raise invalid(f"a request with the req_id {name!r} is not finished yet; use another one", "req_id")
    names.add(name)
    try:
        yield
    finally:
        names.discard(name)


async def replies(service: Service, job: Job, *, stream: bool) -> AsyncGenerator[Reply, None]:
    """The suite's replies. Where the caller ends early, closing the iterator frees the answer's pages.

    Args:
        stream: a reply for each token; else one with the whole text as ``result``.

    Raises:
        ApiError: there is no answer, or no more of it.
    """
    request = job.request
    told = _Told(job)
    with _name_taken(service.worker, request.req_id):
        answer = service.ask(job.ids, job.sampling, adapter=job.adapter, priority=job.priority)
        told.asked = time.time()
        seconds = min(request.timeout, service.limits.seconds)
        late = _LateError(f"the answer took more than {seconds:g} seconds", fix="ask for less, or give it more time")
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        timer = loop.call_at(until, answer.tell, Output(answer.id, 0, None, error=late))
        try:
            async for output in answer:
                # What came in time may be looked at too late: it waits in front of the timer's word.
                error = late if loop.time() > until else output.error
                if error is not None:
                    raise engine_error(error) from error
                told.take(output)
                if output.completion is not None:
                    yield told.whole(output.completion) if not stream else told.last(output.completion)
                elif stream and not request.return_all_tokens:
                    yield told.part()
        finally:
            timer.cancel()
            answer.close()


class _Told:
    """What was said of an answer so far."""

    def __init__(self, job: Job) -> None:
        self.asked = job.prepared
        self._job = job
        self._num_tokens = 0
        self._num_sent = 0
        self._ids: list[int] = []
        self._text: list[str] = []

    def take(self, output: Output) -> None:
        """Note what an output brought; its text waits for the next reply."""
        self._text.append(output.text)
        if output.choice is not None:
            self._num_tokens += 1
            self._ids.append(output.choice.token)

    def part(self) -> Reply:
        """A reply that is not the last."""
        reply = self._reply(self._ids)
        self._ids = []
        return reply

    def last(self, completion: Completion) -> Reply:
        """The reply that ends a stream; the token that ends the answer is counted and not given."""
        ids, stopped = list(completion.ids), self._stopped(completion)
        reply = self._reply(self._ids[:-1] if stopped and self._ids else self._ids)
        return reply | {
            "is_end": 1,
            "tokens_all": completion.text,
            "tokens_all_ids": ids[:-1] if stopped else ids,
            "tokens_all_num": completion.num_tokens,
            "finish_reason": completion.finish_reason,
            "usage": _usage(completion),
        }

    def whole(self, completion: Completion) -> Reply:
        """The one reply where nothing is streamed."""
        reply: Reply = {"result": completion.text, "error_msg": "", "error_code": 0}
        reply |= {"req_id": self._job.request.req_id, "finish_reason": completion.finish_reason}
        if self._job.request.return_usage or self._job.request.response_type == "openai":
            reply["usage"] = _usage(completion)
        if self._job.request.return_all_tokens:
            reply["tokens_all_ids"] = list(completion.ids)[: -1 if self._stopped(completion) else None]
        return reply | self._times()

    def _stopped(self, completion: Completion) -> bool:
        """Whether the answer ends with a stop token; with a stop text its last token is text."""
        return completion.finish_reason == "stop" and completion.ids[-1] in self._job.stop_ids

    def _reply(self, ids: list[int]) -> Reply:
        text = "".join(self._text)
        self._text = []
        reply: Reply = {"token": text, "is_end": 0, "send_idx": self._num_sent, "req_id": self._job.request.req_id}
        self._num_sent += len(ids)
        reply |= {"token_ids": ids, "tokens_all_num": self._num_tokens, "infer_seed": self._job.seed}
        reply |= {"inference_time_cost": time.time() - self.asked, "error_msg": "", "error_code": 0}
        return reply | self._times()

    def _times(self) -> Reply:
        if not self._job.request.benchmark:
            return {}
        return {
            "preprocess_start_time": _date(self._job.came),
            "preprocess_end_time": _date(self._job.prepared),
            "schedule_start_time": _date(self.asked),
            "inference_current_step_time": _date(time.time()),
        }


def _usage(completion: Completion) -> dict[str, int]:
    return {"prompt_tokens": completion.num_prompt_tokens, "completion_tokens": completion.num_tokens}


def _date(seconds: float) -> str:
    return str(datetime.fromtimestamp(seconds, timezone.utc))


def engine_error(error: OarsmithError) -> ApiError:
    """What went wrong with an answer that was begun."""
    if isinstance(error, _LateError):
        return ApiError(504, f"{error.what}; {error.fix}", "server_error", code="timeout")
    return from_oarsmith(error)


def error_reply(error: ApiError, req_id: str | None) -> Reply:
    """The suite's reply to what cannot be answered: 400 the request, 500 the server, 501 what took too long."""
    code = 400 if error.status < 500 and error.status != 429 else 501 if error.status == 504 else 500
    return {"error_msg": error.message, "error_code": code} | ({} if req_id is None else {"req_id": req_id})


def as_json(reply: Mapping[str, Any]) -> str:
    """A reply in one line."""
    return json.dumps(reply, ensure_ascii=False, separators=(",", ":"))


def req_id_in(body: object) -> str | None:
    """The name in a request that may be wrong otherwise."""
    if isinstance(body, list) and len(body) == 1:
        body = body[0]
    name = body.get("req_id") if isinstance(body, Mapping) else None
    return name if isinstance(name, str) and len(name) <= 256 and name.isprintable() else None
