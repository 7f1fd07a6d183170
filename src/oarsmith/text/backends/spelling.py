"""How the tokens of a tokenizer.json spell bytes: read from its decoder."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import tokenizers

from oarsmith.errors import OarsmithError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# What a decoder does to a whole text, not to a token within it.
_AROUND = {"Fuse", "Strip"}


def read_spelling(tokenizer: tokenizers.Tokenizer) -> Callable[[str], bytes]:
    """A function from a token, as the vocabulary writes it, to its bytes within a text.

    Raises:
        OarsmithError: neither byte-level nor pieces of text as sentencepiece has them.
    """
    steps = [] if tokenizer.decoder is None else _steps(json.loads(tokenizer.decoder.__getstate__()))
    kinds = [step["type"] for step in steps]
    if "ByteLevel" in kinds:
        return _byte_level
    unknown = set(kinds) - _AROUND - {"Metaspace", "Replace", "ByteFallback"}
    if unknown or not kinds:
        raise OarsmithError(
            f"it is not known which bytes a token stands for (decoder: {', '.join(kinds) or 'none'})",
            fix="use a byte-level or sentencepiece tokenizer",
        )
    replaced = [_replacement(step) for step in steps if step["type"] in ("Metaspace", "Replace")]
    falls_back = "ByteFallback" in kinds

    def spell(token: str) -> bytes:
        if falls_back and (found := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(found[1], 16)])
        for old, new in replaced:
            token = token.replace(old, new)
        return token.encode("utf-8")

    return spell


def _steps(decoder: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if decoder["type"] == "Sequence":
        return [step for inner in decoder["decoders"] for step in _steps(inner)]
    return [decoder]


def _replacement(step: Mapping[str, Any]) -> tuple[str, str]:
    if step["type"] == "Metaspace":
        return step["replacement"], " "
    pattern = step["pattern"].get("String")
    if pattern is None:
        raise OarsmithError("it is not known which bytes a token stands for (the decoder replaces a pattern)")
    return pattern, step["content"]


def _byte_characters() -> dict[str, int]:
    """GPT-2's alphabet: a printable character for every byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTES = _byte_characters()


def _byte_level(token: str) -> bytes:
    # A token with other characters is taken as it is, as the library's decoder does.
    if all(character in _BYTES for character in token):
        return bytes(_BYTES[character] for character in token)
    return token.encode("utf-8")
