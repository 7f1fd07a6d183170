"""What every tokenizer over a sentencepiece model needs: reading the file, placing added tokens, runs of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sentencepiece

from oarsmith.errors import CheckpointError
from oarsmith.text.special import SpecialTokens, Token

UNDERLINE = "▁"


def read_processor(model: bytes, *, where: str) -> tuple[Any, list[str]]:
    """A sentencepiece processor and its pieces by id.

    Raises CheckpointError when the bytes are no sentencepiece model, or one with a piece that is no text.
    """
    try:
        processor = sentencepiece.SentencePieceProcessor()
        processor.LoadFromSerializedProto(model)
        pieces = [processor.id_to_piece(index) for index in range(processor.get_piece_size())]
    except (RuntimeError, UnicodeDecodeError) as error:
        raise CheckpointError(
            "sentencepiece cannot read the file",
            where=where,
            fix="copy or download it again (a Git LFS pointer or a tiktoken file is no sentencepiece model)",
        ) from error
    return processor, pieces


def piece_bytes(processor: Any, index: int) -> bytes | None:
    """What a piece adds to a text that others stand before; None for control pieces and unknown ids."""
    if not 0 <= index < processor.get_piece_size() or processor.is_control(index) or processor.is_unknown(index):
        return None
    piece: str = processor.id_to_piece(index)
    return bytes([int(piece[3:5], 16)]) if processor.is_byte(index) else piece.replace(UNDERLINE, " ").encode("utf-8")


def place_added(special: SpecialTokens, ids: Mapping[str, int]) -> dict[int, Token]:
    """Added tokens by id: those with a fixed id, then special ones, at their piece's id or after the last one."""
    added = dict(special.added)
    known = {token.content: index for index, token in added.items()}
    vocabulary = {**ids, **known}
    for token in special.all():
        if token.content in known:
            continue
        index = vocabulary.setdefault(token.content, len(vocabulary))
        known[token.content] = index
        added[index] = token
    return added


def runs(tokens: Sequence[str], marked: frozenset[str]) -> list[tuple[bool, list[str]]]:
    """Split into maximal runs of marked and unmarked tokens."""
    found: list[tuple[bool, list[str]]] = []
    for token in tokens:
        is_marked = token in marked
        if not found or found[-1][0] != is_marked:
            found.append((is_marked, []))
        found[-1][1].append(token)
    return found
