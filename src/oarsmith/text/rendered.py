"""Rendered conversations whose control tokens stand apart from what people wrote.

Some models' control tokens cannot be spelled in text (ChatGLM2 and 3), and some authors encode a message apart from
what is around it (Qwen-1, Baichuan, ChatGLM3). A template for them says `control('<|user|>')` for a token and
`border()` where encoding begins anew; the rendering remembers both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from oarsmith.errors import DataError

# Noncharacters: reserved for internal use, no text holds them. They stand in a rendering only until it is parsed.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"


@dataclass(frozen=True)
class Part:
    """A stretch of a rendering that is encoded by itself: one control token, or text."""

    text: str
    is_control: bool


class RenderedChat(str):
    """A rendered conversation as text, with the parts it is encoded by.

    It is the text to read and compare; what is cut out of it or joined to it is plain text without parts.
    """

    parts: tuple[Part, ...]

    def __new__(cls, parts: Sequence[Part]) -> RenderedChat:
        chat = super().__new__(cls, "".join(part.text for part in parts))
        chat.parts = tuple(parts)
        return chat

    def __getnewargs__(self) -> tuple[tuple[Part, ...]]:  # type: ignore[override]
        return (self.parts,)


def control(token: str) -> str:
    """A control token as templates write it; one that is not given (an undefined variable) is a TypeError."""
    if not isinstance(token, str) or not token:
        raise TypeError("control() wants the text of a token")
    return f"{_OPEN}{token}{_CLOSE}"


def border() -> str:
    """Where encoding begins anew, as templates write it."""
    return _CLOSE


def parse(marked: str) -> RenderedChat:
    """The parts of a rendering with marks."""
    parts: list[Part] = []
    for number, stretch in enumerate(marked.split(_OPEN)):
        pieces = stretch.split(_CLOSE)
        if number > 0:
            parts.append(Part(pieces.pop(0), is_control=True))
        parts += [Part(piece, is_control=False) for piece in pieces if piece]
    return RenderedChat(parts)


def without_marks(marked: str, position: int) -> int:
    """What a character position becomes when the marks are gone."""
    return position - marked.count(_OPEN, 0, position) - marked.count(_CLOSE, 0, position)


def refuse_marks(values: Any) -> None:
    """Raises DataError when a text in the conversation holds one of the marks, which would make it a control token."""
    if isinstance(values, str):
        if _OPEN in values or _CLOSE in values:
            raise DataError(
                "the conversation holds U+FDD0 or U+FDD1, which are no characters",
                fix="remove them: this template marks control tokens with them",
            )
    elif isinstance(values, Mapping):
        refuse_marks([*values, *values.values()])
    elif isinstance(values, Sequence):
        for value in values:
            refuse_marks(value)
