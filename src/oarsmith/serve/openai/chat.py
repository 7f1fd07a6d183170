"""``POST /v1/chat/completions``."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from oarsmith.engine import Sampling
from oarsmith.engine.choice import Choice
from oarsmith.engine.ticket import Output
from oarsmith.serve.errors import invalid
from oarsmith.serve.openai.mapping import copies_of, messages_of, sampling_of, template_variables
from oarsmith.serve.openai.objects import answers_of, chat_logprobs, head, usage_of
from oarsmith.serve.openai.schemas import ChatRequest
from oarsmith.serve.openai.tool_use import ToolUse
from oarsmith.serve.service import Service
from oarsmith.serve.watch import event, stream, while_wanted
from oarsmith.serve.worker import Answer


async def chat(service: Service, request: Request, body: ChatRequest) -> Response:
    """A conversation goes on.

    Raises:
        ApiError: it cannot.
    """
    adapter = service.adapter_of(body.model)
    tools = ToolUse.of(body, service.tokenizer)
    ids = await service.encode(
        messages_of(body.messages),
        tools=tools.schemas or None,
        param="messages",
        **template_variables(body.chat_template_kwargs, body.add_generation_prompt),
    )
    if body.src_length is not None and len(ids) > body.src_length:
        raise invalid(f"the conversation has {len(ids)} tokens, more than src_length", "src_length")
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise invalid("max_tokens and max_completion_tokens say different things", "max_completion_tokens")
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs without logprobs", "top_logprobs")
    sampling = sampling_of(
        service,
        body,
        body.max_completion_tokens or body.max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        **tools.constraint,
    )
    await service.prepare(sampling)
    talk = _Talk(service, body, ids, sampling, adapter, tools)
    if not body.stream:
        return JSONResponse(await while_wanted(service, request, talk.whole()))
    return await stream(service, request, talk.events())


class _Talk:
    """One request's answers."""

    def __init__(
        self,
        service: Service,
        body: ChatRequest,
        ids: list[int],
        sampling: Sampling,
        adapter: str | None,
        tools: ToolUse,
    ) -> None:
        self._service, self._body, self._ids, self._sampling = service, body, ids, sampling
        self._adapter, self._tools = adapter, tools
        self._model = body.model or service.name
        self._copies = copies_of(service, body)

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        answer = self._service.ask(self._ids, self._sampling, adapter=self._adapter, priority=self._body.priority)
        try:
            completion = await answer.completion()
        finally:
            answer.close()
        answers = answers_of(completion, self._copies)
        choices = []
        for index, one in enumerate(answers):
            content, calls = self._tools.read(one.text)
            message: dict[str, Any] = {"role": "assistant", "content": content if content or not calls else None}
            if calls:
                message["tool_calls"] = calls
            logprobs = None if one.logprobs is None else chat_logprobs(self._service.tokenizer, one.logprobs)
            finish = "tool_calls" if calls and one.finish_reason == "stop" else one.finish_reason
            choices.append({"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish})
        num_new = sum(one.num_tokens for one in answers_of(completion, 1))
        usage = usage_of(len(self._ids), num_new)
        return {**head("chatcmpl", "chat.completion", self._model), "choices": choices, "usage": usage}

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Chunks as they come; of more answers than are given (``best_of``) nothing before the end."""
        chunk = head("chatcmpl", "chat.completion.chunk", self._model)
        wants_usage = self._body.stream_options is not None and self._body.stream_options.include_usage
        if wants_usage:
            chunk["usage"] = None
        sampling = self._sampling
        answer = self._service.ask(self._ids, sampling, adapter=self._adapter, priority=self._body.priority)
        readers = [self._tools.stream() for _ in range(sampling.n)]
        count, shown, begun, num_new = sampling.n * self._copies, sampling.num_samples == sampling.n, False, 0

        def parts(index: int, deltas: list[dict[str, Any]], tokens: Sequence[Choice], **more: Any) -> list[bytes]:
            """For an answer and those that are the same; the first delta has the tokens."""
            same, fields = range(count) if self._copies > 1 else [index], more | self._logprobs(tokens)
            found = []
            for delta in deltas or ([{"content": ""}] if "logprobs" in fields else []):
                found += [event({**chunk, "choices": [{**_delta(i, delta), **fields}]}) for i in same]
                fields = more
            return found

        try:
            async with aclosing(_outputs(answer)) as outputs:
                async for output in outputs:
                    if not begun:
                        begun = True
                        for index in range(count):
                            yield event({**chunk, "choices": [_delta(index, {"role": "assistant", "content": ""})]})
                    if shown:
                        tokens = [] if output.choice is None else [output.choice]
                        for part in parts(output.index, readers[output.index].feed(output.text), tokens):
                            yield part
                    if output.completion is not None:
                        answers = answers_of(output.completion, 1)
                        num_new = sum(one.num_tokens for one in answers)
                        for index, (one, reader) in enumerate(zip(answers, readers, strict=True)):
                            last, tokens = ([], []) if shown else (reader.feed(one.text), list(one.logprobs or ()))
                            for part in parts(index, [*last, *reader.finish()], tokens):
                                yield part
                            finish = (
                                "tool_calls" if reader.num_calls and one.finish_reason == "stop" else one.finish_reason
                            )
                            for part in parts(index, [{}], [], finish_reason=finish):
                                yield part
        finally:
            answer.close()
        if wants_usage:
            yield event({**chunk, "choices": [], "usage": usage_of(len(self._ids), num_new)})

    def _logprobs(self, tokens: Sequence[Choice]) -> dict[str, Any]:
        if self._sampling.logprobs is None or not tokens:
            return {}
        return {"logprobs": chat_logprobs(self._service.tokenizer, tokens)}


async def _outputs(answer: Answer) -> AsyncGenerator[Output, None]:
    async for output in answer:
        if output.error is not None:
            raise output.error
        yield output


def _delta(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
