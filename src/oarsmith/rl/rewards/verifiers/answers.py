"""Where the final answer of a text stands."""

from __future__ import annotations

import re

# Bounded everywhere: a text that means harm takes no longer than others.
_SAID = re.compile(
    r"(?:the[ \t]{1,3}|final[ \t]{1,3})?answer[ \t]{0,3}(?:is|:|=)[ \t:*]{0,8}"
    r"([^\n]{1,400}?)(?:\*\*|[.。]?[ \t]{0,3}(?:\n|$)|\.[ \t])",
    re.IGNORECASE,
)
_HASHES = re.compile(r"####[ \t]{0,8}([^\n]{1,400})")
_DIGITS = r"(?:\d{1,3}(?:,\d{3}){1,60}|\d{1,200})"
NUMBER = re.compile(rf"[-+]?{_DIGITS}(?:\.\d{{1,200}})?(?:[eE][-+]?\d{{1,3}})?%?|[-+]?\.\d{{1,200}}%?")
_FRACTION = re.compile(rf"(?:{NUMBER.pattern})\s{{0,3}}/\s{{0,3}}\d{{1,200}}$")
_BRACES = re.compile(r"\\(?:boxed|fbox)\s{0,3}\{|\\.|[{}]")
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
    last: re.Match[str] | None = None
    for number in NUMBER.finditer(text):
        last = number
    if last is None:
        return None
    fraction = _FRACTION.search(text[max(0, last.start() - 60) : last.end()])
    return (fraction or last)[0]


def last_boxed(text: str) -> str | None:
    r"""What is in the last whole ``\boxed{...}`` or ``\fbox{...}``, with balanced braces."""
    opened: list[tuple[int, bool]] = []
    best: tuple[int, int] | None = None
    for found in _BRACES.finditer(text):
        if found[0].endswith("{") and found[0] != "\\{":
            opened.append((found.end(), len(found[0]) > 1))
        elif found[0] == "}" and opened:
            start, is_box = opened.pop()
            if is_box and (best is None or start > best[0]):
                best = (start, found.start())
    return None if best is None else text[best[0] : best[1]].strip()
