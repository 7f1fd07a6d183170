"""Replies as OpenAI's objects, where a native request asks for ``response_type: openai``."""

from __future__ import annotations

import time
from typing import Any

from oarsmith.serve.kserve.native import NativeRequest

Reply = dict[str, Any]


class OpenAIForm:
    """Puts one request's replies into the form of chat completions."""

    def __init__(self, request: NativeRequest, model: str) -> None:
        self._request = request
        self._head = {"id": request.req_id, "created": int(time.time()), "model": model}
        self._begun = False

    def chunk(self, reply: Reply) -> Reply:
        """A streamed reply as a chunk."""
        delta = {"content": reply["token"]} if self._begun else {"role": "assistant", "content": reply["token"]}
        self._begun = True
        choice = {"index": 0, "delta": delta, "finish_reason": reply.get("finish_reason")}
        usage = {"usage": _usage(reply["usage"])} if self._request.return_usage and "usage" in reply else {}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice], **usage}

    def whole(self, reply: Reply) -> Reply:
        """The one reply as a chat completion."""
        message = {"role": "assistant", "content": reply["result"]}
        choice = {"index": 0, "message": message, "finish_reason": reply["finish_reason"], "logprobs": None}
        return {**self._head, "object": "chat.completion", "choices": [choice], "usage": _usage(reply["usage"])}


def _usage(usage: dict[str, int]) -> dict[str, int]:
    return {**usage, "total_tokens": sum(usage.values())}
