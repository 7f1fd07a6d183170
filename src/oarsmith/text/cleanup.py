"""`clean_up_tokenization_spaces`: the spaces transformers takes out of decoded English."""

from __future__ import annotations

from collections.abc import Iterable

_REPLACEMENTS = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)
_LONGEST = max(len(pattern) for pattern, _ in _REPLACEMENTS)


def clean_up_spaces(text: str) -> str:
    """The text with spaces before punctuation and contractions removed, in transformers' order."""
    for pattern, replacement in _REPLACEMENTS:
        text = text.replace(pattern, replacement)
    return text


def settled_length(text: str) -> int:
    """Length of the longest prefix whose cleaned text no continuation changes.

    A pattern starts with a space and has at most four characters, and cleaning removes nothing but spaces: no pattern
    reaches across a point that has no space among the three characters before it.
    """
    reach = _LONGEST - 1
    for end in range(len(text), reach - 1, -1):
        if " " not in text[end - reach : end]:
            return end
    return 0


class Openings:
    """Which pieces may leave one of some patterns half written at the end of a text.

    Args:
        patterns: what decoding replaces once it stands there whole.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        self._beginnings = frozenset(text[:size] for text in patterns for size in range(1, len(text)))
        self._endings = frozenset(text[start:] for text in self._beginnings for start in range(len(text)))
        self._longest = max(map(len, self._beginnings), default=0)

    def has(self, piece: str) -> bool:
        """Whether what follows this piece may complete a pattern that begins in it or before it."""
        ends = (piece[-size:] for size in range(1, min(self._longest, len(piece)) + 1))
        return piece in self._endings or any(end in self._beginnings for end in ends)


CLEANED = Openings(pattern for pattern, _ in _REPLACEMENTS)
"""For `clean_up_spaces`."""
