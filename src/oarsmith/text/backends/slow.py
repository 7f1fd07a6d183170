"""What transformers' Python tokenizers do around an author's own code: cut tokens out of a text, join texts again.

Versions before 4.34, which most of that code is written against, let a token given as a plain string swallow the white
space on both its sides; one given as an object does what its flags say. `added_tokens_decoder` in
tokenizer_config.json is the mark of later versions (called modern here). `single_word` does nothing in either.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from oarsmith.text.special import SpecialTokens, Token

T = TypeVar("T")


class Cutter:
    """Splits a text at tokens.

    Args:
        tokens: what is cut out; the longest one wins where several match.
        swallowing: texts of those that swallow white space on both sides whatever their flags.
    """

    def __init__(self, tokens: Iterable[Token], swallowing: frozenset[str]) -> None:
        self._tokens = {token.content: token for token in tokens if token.content}
        self._swallowing = swallowing
        longest_first = sorted(self._tokens, key=len, reverse=True)
        self._pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None

    def split(self, text: str) -> list[tuple[bool, str]]:
        """Parts of the text in order, none empty: (is a token, text)."""
        if self._pattern is None:
            return [(False, text)] if text else []
        parts = [part for part in self._pattern.split(text) if part]
        for i, part in enumerate(parts):
            token = self._tokens.get(part)
            if token is None:
                continue
            both = part in self._swallowing
            if i + 1 < len(parts) and (both or token.rstrip):
                parts[i + 1] = parts[i + 1].lstrip()
            if i > 0 and (both or token.lstrip):
                parts[i - 1] = parts[i - 1].rstrip()
        return [(part in self._tokens, part) for part in parts if part]


def is_modern(config: Mapping[str, Any]) -> bool:
    """Whether tokenizer_config.json was written by transformers 4.34 or later."""
    return "added_tokens_decoder" in config


def swallowing(config: Mapping[str, Any], tokens: Iterable[Token]) -> frozenset[str]:
    """Those tokens that swallow the white space around them: given as plain strings."""
    return frozenset() if is_modern(config) else frozenset(token.content for token in tokens if token.bare)


def spaced_tokens(
    config: Mapping[str, Any], special: SpecialTokens, added: Mapping[int, Token], model_size: int
) -> frozenset[str]:
    """Tokens that decoding sets apart with spaces: those the model's own vocabulary of `model_size` lacks.

    In modern versions only further special tokens among them, and all added tokens that are not special.
    """
    beyond = frozenset(token.content for index, token in added.items() if not 0 <= index < model_size)
    if not is_modern(config):
        return beyond
    plain = {token.content for token in added.values()} - {token.content for token in special.all()}
    return beyond & {token.content for token in special.additional} | plain


def join_spaced(tokens: Sequence[T], spaced: Mapping[T, str], join: Callable[[list[T]], str], *, modern: bool) -> str:
    """Tokens as text: runs joined by `join`, and spaces between the runs and the texts of the spaced tokens."""
    texts: list[str] = []
    run: list[T] = []
    for token in tokens:
        if token not in spaced:
            run.append(token)
            continue
        text = join(run) if run else ""
        if text or (run and not modern):
            texts.append(text)
        run = []
        texts.append(spaced[token])
    return " ".join([*texts, join(run)] if run else texts)
