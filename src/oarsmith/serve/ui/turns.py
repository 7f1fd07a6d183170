"""A conversation as the page keeps it: a list of messages with role and content."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Turns = list[dict[str, Any]]


def plain(history: Sequence[Any] | None) -> Turns:
    """Messages as role and text; the page gives contents back in pieces."""
    return [{"role": str(turn["role"]), "content": text_of(turn["content"])} for turn in history or []]


def text_of(content: Any) -> str:
    """The text of a content, whole or in pieces."""
    if isinstance(content, str):
        return content
    if isinstance(content, dict):
        return str(content.get("text") or "")
    return "".join(text_of(part) for part in content or [])


def asked(history: Sequence[Any] | None, text: str) -> Turns:
    """With one more message of the user."""
    return [*plain(history), {"role": "user", "content": text}]


def before_answer(history: Sequence[Any] | None) -> Turns:
    """Without the last answer, so that it can be given again; empty: there is nothing to answer."""
    turns = plain(history)
    while turns and turns[-1]["role"] != "user":
        turns.pop()
    return turns


def undone(history: Sequence[Any] | None) -> tuple[Turns, str]:
    """Without the last question and its answer; and the question."""
    turns = before_answer(history)
    return turns[:-1], turns[-1]["content"] if turns else ""


def edited(history: Sequence[Any] | None, index: int, text: str) -> Turns:
    """Up to a message of the user, which says something else now."""
    return [*plain(history)[:index], {"role": "user", "content": text}]
