"""The fields of a sentencepiece ``tokenizer.model`` that GGUF holds too, read from its protobuf bytes.

Format: sentencepiece_model.proto. The sentencepiece package tells pieces and scores, but not which are user-defined and
how text is normalised, unless protobuf is installed beside it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from oarsmith.errors import CheckpointError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_UNIGRAM = 1


@dataclass
class SentencePieceModel:
    """pieces: (text, score, type) with the type numbers GGUF uses too. The rest as in the protobuf."""

    pieces: list[tuple[str, float, int]] = field(default_factory=list)
    is_unigram: bool = True
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    charsmap: bytes = b""


def parse_sentencepiece(data: bytes, *, where: str) -> SentencePieceModel:
    """Read a ``tokenizer.model``.

    Raises:
        CheckpointError: not such a file.
    """
    model = SentencePieceModel()
    try:
        for number, value in _fields(data):
            if number == 1 and isinstance(value, bytes):
                model.pieces.append(_piece(value))
            elif number == 2 and isinstance(value, bytes):
                for inner, kind in _fields(value):
                    if inner == 3:
                        model.is_unigram = kind == _UNIGRAM
            elif number == 3 and isinstance(value, bytes):
                _read_normalizer(model, value)
    except (IndexError, UnicodeDecodeError, struct.error) as error:
        raise CheckpointError(
            "not a sentencepiece model", where=where, fix="copy or download the file again"
        ) from error
    return model


def _piece(data: bytes) -> tuple[str, float, int]:
    text, score, kind = "", 0.0, 1
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            text = value.decode("utf-8")
        elif number == 2 and isinstance(value, bytes):
            score = struct.unpack("<f", value)[0]
        elif number == 3 and isinstance(value, int):
            kind = value
    return text, score, kind


def _read_normalizer(model: SentencePieceModel, data: bytes) -> None:
    for number, value in _fields(data):
        if number == 2 and isinstance(value, bytes):
            model.charsmap = value
        elif number == 3:
            model.add_dummy_prefix = bool(value)
        elif number == 4:
            model.remove_extra_whitespaces = bool(value)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a message; fixed-size values come as bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if kind == _BYTES:
            size, at = _varint(data, at)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            raise IndexError(f"wire type {kind}")
        if at + size > len(data):
            raise IndexError("the message ends early")
        yield tag >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise IndexError("a number of more than 64 bits")
