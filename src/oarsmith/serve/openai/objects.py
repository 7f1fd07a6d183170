"""OpenAI's objects as plain dictionaries: a stream makes one for every token."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from oarsmith.engine.choice import Choice
from oarsmith.engine.request import Completion
from oarsmith.text import Tokenizer


def head(kind: str, object: str, model: str) -> dict[str, Any]:
    """The fields that every answer begins with."""
    return {"id": f"{kind}-{secrets.token_hex(12)}", "object": object, "created": int(time.time()), "model": model}


def usage_of(num_prompt: int, num_new: int) -> dict[str, int]:
    """How many tokens."""
    return {"prompt_tokens": num_prompt, "completion_tokens": num_new, "total_tokens": num_prompt + num_new}


def answers_of(completion: Completion, copies: int) -> list[Completion]:
    """All answers to a prompt; greedy ones are given as often as was asked."""
    return [completion, *completion.others] * copies


def _named(tokenizer: Tokenizer, token: int, logprob: float | None) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token)
    text = tokenizer.decode([token]) if raw is None else raw.decode("utf-8", "replace")
    return {"token": text, "logprob": logprob, "bytes": list(text.encode() if raw is None else raw)}


def chat_logprobs(tokenizer: Tokenizer, choices: Sequence[Choice]) -> dict[str, Any]:
    """``logprobs`` of a chat's choice."""
    content = [
        {
            **_named(tokenizer, choice.token, choice.logprob),
            "top_logprobs": [_named(tokenizer, token, logprob) for token, logprob in choice.top],
        }
        for choice in choices
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(tokenizer: Tokenizer, choices: Sequence[Choice | None], first: int = 0) -> dict[str, Any]:
    """``logprobs`` of a completion's choice; None stands for the first token of a prompt.

    Args:
        first: where the text of the first token begins in the answer's.
    """
    found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for choice in choices:
        if choice is None:
            continue
        name = _named(tokenizer, choice.token, choice.logprob)["token"]
        found["tokens"].append(name)
        found["token_logprobs"].append(choice.logprob)
        top = {_named(tokenizer, token, value)["token"]: value for token, value in choice.top}
        found["top_logprobs"].append(top if choice.logprob is not None else None)
        found["text_offset"].append(first)
        first += len(name)
    return found
