"""`clean_up_tokenization_spaces`: the spaces transformers takes out of decoded English."""

from __future__ import annotations

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
