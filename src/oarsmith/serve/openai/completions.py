"""``POST /v1/completions``: texts go on as they are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from oarsmith.engine import Sampling
from oarsmith.engine.choice import Choice
from oarsmith.engine.request import Completion
from oarsmith.engine.ticket import Output
from oarsmith.serve.errors import invalid
from oarsmith.serve.openai.mapping import copies_of, sampling_of
from oarsmith.serve.openai.objects import answers_of, completion_logprobs, head, usage_of
from oarsmith.serve.openai.schemas import CompletionRequest
from oarsmith.serve.service import Service
from oarsmith.serve.watch import event, stream, while_wanted
from oarsmith.serve.worker import Answer


def prompts_of(given: str | list[int] | list[str] | list[list[int]]) -> list[str | list[int]]:
    """A list of prompts, where one may stand for itself."""
    if isinstance(given, str):
        return [given]
    if isinstance(given[0], int):
        return [[int(token) for token in given]]
    return list(given)


async def complete(service: Service, request: Request, body: CompletionRequest) -> Response:
    """Each prompt's continuations.

    Raises:
        ApiError: there can be none.
    """
    adapter, prompts = service.adapter_of(body.model), prompts_of(body.prompt)
    if len(prompts) * body.n > service.limits.max_answers:
        raise invalid(f"{len(prompts)} prompts and {body.n} answers to each are too many at once", "prompt")
    ids = [await service.encode(prompt, param="prompt") for prompt in prompts]
    if body.max_tokens == 0 and not body.echo:
        raise invalid("max_tokens 0 without echo leaves nothing to answer", "max_tokens")
    if body.echo and body.stream:
        raise invalid("echo is not streamed", "echo")
    # Without a new token there would be no step: one is computed, and not shown.
    wanted = {"prompt_logprobs": body.logprobs} if body.echo and body.logprobs is not None else {}
    sampling = sampling_of(service, body, body.max_tokens or 1, logprobs=body.logprobs, **wanted)
    await service.prepare(sampling)
    work = _Continuations(service, body, ids, sampling, adapter)
    if not body.stream:
        return JSONResponse(await while_wanted(service, request, work.whole()))
    return await stream(service, request, work.events())


class _Continuations:
    """One request's answers."""

    def __init__(
        self, service: Service, body: CompletionRequest, ids: list[list[int]], sampling: Sampling, adapter: str | None
    ) -> None:
        self._service, self._body, self._ids, self._sampling = service, body, ids, sampling
        self._adapter = adapter
        self._copies = copies_of(service, body)
        self._head = head("cmpl", "text_completion", body.model or service.name)

    def _ask(self) -> list[Answer]:
        answers: list[Answer] = []
        try:
            for ids in self._ids:
                answers.append(
                    self._service.ask(ids, self._sampling, adapter=self._adapter, priority=self._body.priority)
                )
        except BaseException:
            for answer in answers:
                answer.close()
            raise
        return answers

    async def whole(self) -> dict[str, Any]:
        """All answers in one piece."""
        asked = self._ask()
        try:
            found = await asyncio.gather(*(answer.completion() for answer in asked))
        finally:
            for answer in asked:
                answer.close()
        choices = [
            self._choice(ids, completion, one)
            for ids, completion in zip(self._ids, found, strict=True)
            for one in answers_of(completion, self._copies)
        ]
        silent = self._body.max_tokens == 0
        num_new = 0 if silent else sum(one.num_tokens for done in found for one in answers_of(done, 1))
        usage = usage_of(sum(map(len, self._ids)), num_new)
        return {**self._head, "choices": [{"index": i, **c} for i, c in enumerate(choices)], "usage": usage}

    def _choice(self, ids: list[int], completion: Completion, one: Completion) -> dict[str, Any]:
        body, tokenizer = self._body, self._service.tokenizer
        silent = body.max_tokens == 0
        text = "" if silent else one.text
        choices: list[Choice] = [] if silent else list(one.logprobs or ())
        if body.echo:
            text = tokenizer.decode(ids, skip_special_tokens=True) + text
            choices = [Choice(ids[0]), *(completion.prompt_logprobs or ()), *choices]
        logprobs = None if body.logprobs is None else completion_logprobs(tokenizer, choices)
        finish = "length" if silent else one.finish_reason
        return {"text": text, "logprobs": logprobs, "finish_reason": finish}

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Chunks of all answers as they come."""
        wants_usage = self._body.stream_options is not None and self._body.stream_options.include_usage
        chunk = {**self._head, "usage": None} if wants_usage else self._head
        asked, each = self._ask(), self._sampling.n * self._copies
        shown, num_new = self._sampling.num_samples == self._sampling.n, 0
        offsets: dict[int, int] = {}
        try:
            async with aclosing(_together(asked)) as outputs:
                async for number, output in outputs:
                    for index, text, finish, choices in self._pieces(output, shown):
                        logprobs = None
                        if self._body.logprobs is not None and choices:
                            offset = offsets.get(number * each + index, 0)
                            logprobs = completion_logprobs(self._service.tokenizer, choices, offset)
                            offsets[number * each + index] = offset + len(text)
                        choice = {"text": text, "logprobs": logprobs, "finish_reason": finish}
                        same = range(each) if self._copies > 1 else [index]
                        for i in same:
                            yield event({**chunk, "choices": [{"index": number * each + i, **choice}]})
                    if output.completion is not None:
                        num_new += sum(one.num_tokens for one in answers_of(output.completion, 1))
        finally:
            for answer in asked:
                answer.close()
        if wants_usage:
            yield event({**chunk, "choices": [], "usage": usage_of(sum(map(len, self._ids)), num_new)})

    def _pieces(self, output: Output, shown: bool) -> list[tuple[int, str, str | None, list[Choice]]]:
        """(answer, text, why it ended, tokens) that an output brings."""
        found: list[tuple[int, str, str | None, list[Choice]]] = []
        if shown and (output.text or (self._body.logprobs is not None and output.choice is not None)):
            found.append((output.index, output.text, None, [] if output.choice is None else [output.choice]))
        if output.completion is not None:
            for index, one in enumerate(answers_of(output.completion, 1)):
                rest = ("", []) if shown else (one.text, list(one.logprobs or ()))
                found.append((index, rest[0], one.finish_reason, rest[1]))
        return found


async def _together(asked: list[Answer]) -> AsyncGenerator[tuple[int, Output], None]:
    """Outputs of several answers as they come.

    Raises:
        OarsmithError: one of them has none.
    """
    queue: asyncio.Queue[tuple[int, Output | None]] = asyncio.Queue()

    async def read(number: int, answer: AsyncIterator[Output]) -> None:
        async for output in answer:
            queue.put_nowait((number, output))
        queue.put_nowait((number, None))

    tasks = [asyncio.ensure_future(read(number, answer.__aiter__())) for number, answer in enumerate(asked)]
    left = len(tasks)
    try:
        while left:
            number, output = await queue.get()
            if output is None:
                left -= 1
                continue
            if output.error is not None:
                raise output.error
            yield number, output
    finally:
        for task in tasks:
            task.cancel()
