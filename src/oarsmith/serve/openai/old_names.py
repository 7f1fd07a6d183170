"""Names of PaddleNLP's Flask server for what OpenAI calls otherwise."""

from __future__ import annotations

from typing import Any

# Old name -> name.
_RENAMED = {"max_length": "max_tokens", "min_length": "min_tokens", "message": "messages"}


def modernized(body: Any) -> Any:
    """A chat request with OpenAI's names: ``message`` for ``messages``, ``context`` and ``history``, ``max_length``."""
    if not isinstance(body, dict):
        return body
    found = dict(body)
    for old, new in _RENAMED.items():
        if old in found and new not in found:
            found[new] = found.pop(old)
    if "messages" not in found and isinstance(found.get("context"), str):
        history = found.pop("history", None) or []
        if not isinstance(history, list):
            raise ValueError("history is no list")
        found["messages"] = conversation(history, found.pop("context"))
    if isinstance(found.get("messages"), (str, dict)):
        only = found["messages"]
        found["messages"] = [{"role": "user", "content": only} if isinstance(only, str) else only]
    return found


def conversation(history: list[Any], context: str) -> list[dict[str, Any]]:
    """Earlier turns (texts of user and bot by turns, or objects with role and utterance) and the last message."""
    found: list[dict[str, Any]] = []
    for number, turn in enumerate(history):
        if isinstance(turn, dict):
            role = str(turn.get("role", "user"))
            content = turn.get("utterance", turn.get("content", ""))
            found.append({"role": "assistant" if role in ("bot", "assistant") else role, "content": content})
        else:
            found.append({"role": "assistant" if number % 2 else "user", "content": turn})
    return [*found, {"role": "user", "content": context}]
