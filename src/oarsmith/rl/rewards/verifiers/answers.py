"""Where the final answer of a text stands."""

from __future__ import annotations

import re

_SAID = re.compile(
    r"(?:final\s+answer|the\s+answer|answer)\s*(?:is|:|=)\s*:?\s*\**\s*(.+?)(?:\*\*|[.。]?\s*(?:\n|$)|\.\s)",
    re.IGNORECASE,
)
_HASHES = re.compile(r"####[ \t]*([^\n]+)")
NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?%?|[-+]?\.\d+%?")
_FRACTION = re.compile(rf"(?:{NUMBER.pattern})\s*/\s*\d+(?![\d.])")
_THOUGHT = "</think>"
MAX_CHARACTERS = 200_000
"""More of a text than its last so many characters is not looked at."""


def final_answer(text: str, *, anywhere: bool = True) -> str | None:
    r"""The final answer: the last ``\boxed{...}``, else what follows the last ``####``, else the last "answer is ...",
    else the last number or fraction. What stands before ``</think>`` does not count.

    Args:
        anywhere: the last number counts; else only a marked answer does.
    """
    text = text[-MAX_CHARACTERS:].rpartition(_THOUGHT)[2]
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    for pattern in (_HASHES, _SAID):
        found = pattern.findall(text)
        if found:
            return str(found[-1]).strip()
    if not anywhere:
        return None
    numbers = list(NUMBER.finditer(text))
    if not numbers:
        return None
    fractions = [found for found in _FRACTION.finditer(text) if found.end() >= numbers[-1].end()]
    return (fractions[-1] if fractions else numbers[-1])[0]


def last_boxed(text: str) -> str | None:
    r"""What is in the last whole ``\boxed{...}`` or ``\fbox{...}``, with balanced braces."""
    starts = [found.end() for found in re.finditer(r"\\(?:boxed|fbox)\s*\{", text)]
    for start in reversed(starts):
        depth = 1
        for at in range(start, len(text)):
            if text[at] in "{}" and text[at - 1] != "\\":
                depth += 1 if text[at] == "{" else -1
                if depth == 0:
                    return text[start:at].strip()
    return None
