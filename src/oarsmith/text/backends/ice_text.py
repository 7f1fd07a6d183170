"""ChatGLM-6B's `ice_text.model`: a sentencepiece model whose ids stand after those of image tokens.

Line breaks, tabs and runs of spaces are pieces of their own (`<n>`, `<|tab|>`, `<|blank_2|>` to `<|blank_80|>`).
Written from the behaviour of the authors' tokenization_chatglm.py under transformers 4.33; none of it is run.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from oarsmith.errors import CheckpointError, OarsmithError
from oarsmith.text.backends.slow import Cutter, swallowing
from oarsmith.text.backends.spm import piece_bytes, read_processor
from oarsmith.text.cleanup import Openings
from oarsmith.text.special import SpecialTokens

CONTROLS = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")
_MAX_IMAGE_TOKENS = 1_000_000
_MAX_BLANKS = 80
_TAB = "<|tab|>"
_BLANKS = {f"<|blank_{n}|>": " " * n for n in range(2, _MAX_BLANKS + 1)}
_OPENINGS = Openings(("<n>", _TAB, *_BLANKS))
_CONTROL, _USER_DEFINED, _BYTE = 3, 4, 6  # sentencepiece's piece types


class IceText:
    """ChatGLM-6B's tokenizer."""

    def __init__(self, model: bytes, config: Mapping[str, Any], special: SpecialTokens, *, where: str) -> None:
        """
        Args:
            model: bytes of ice_text.model. Raises CheckpointError when sentencepiece cannot read them.
            config: tokenizer_config.json; `num_image_tokens` (default 20000) is what text ids start at.
            special: special tokens, all of which must be in the model.
        """
        self._model = model
        self._offset = _image_tokens(config, where)
        self._lowers = bool(config.get("do_lower_case", False))
        self._squeezes = bool(config.get("remove_space", False))
        self._processor, pieces = read_processor(model, where=where)
        if "[gMASK]" not in pieces:
            # The first release's file holds no control pieces; its code appends them.
            self._processor, pieces = read_processor(model + _extension(), where=where)
        self._size = len(pieces)
        self._gmask, self._sop = self._text_id("[gMASK]"), self._text_id("<sop>")
        tokens = {token.content: token for token in special.all()}
        self._special = {text: self._special_id(text, where) for text in tokens}
        self._pad = self._special[special.named["pad_token"].content] if "pad_token" in special.named else None
        self._swallowing = swallowing(config, tokens.values())
        self._cutter = Cutter(tokens.values(), self._swallowing)
        texts = "|".join(map(re.escape, tokens))
        self._words = re.compile(f"({texts})") if texts else None

    def _text_id(self, piece: str) -> int:
        index: int = self._processor.piece_to_id(piece)
        return self._offset + index

    def _special_id(self, text: str, where: str) -> int:
        index = self.token_to_id(text)
        if index is None:
            raise CheckpointError(
                f"the special token '{text}' is not in the file",
                where=where,
                fix="tokenizer_config.json and ice_text.model must come from the same release",
            )
        return index

    @property
    def vocab_size(self) -> int:
        return self._offset + self._size

    @cached_property
    def special_ids(self) -> frozenset[int]:
        return frozenset(self._special.values())

    @property
    def added_ids(self) -> frozenset[int]:
        return frozenset(self._special.values())

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        after = [self._gmask, self._sop] if add_special_tokens else []
        return [[*self._encode(text), *after] for text in texts]

    def _encode(self, text: str) -> list[int]:
        if self._lowers:
            parts = self._words.split(text) if self._words is not None else [text]
            text = "".join(part if part in self._special else part.lower() for part in parts)
        ids: list[int] = []
        for is_token, part in self._cutter.split(text):
            ids += [self._special[part]] if is_token else self.encode_content(part)
        return ids

    def encode_content(self, text: str) -> list[int]:
        text = " ".join(text.split()) if self._squeezes else text
        return [self._offset + index for index in self._processor.encode(_with_blank_pieces(text))]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        raise OarsmithError(
            "character positions of tokens are not available for a sentencepiece ice_text.model",
            fix="use a template without {% generation %} blocks",
        )

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        skipped = self.special_ids if skip_special_tokens else frozenset({self._pad})
        pieces = [self.id_to_token(i) for i in ids if i not in skipped]
        known = [piece for piece in pieces if piece is not None]
        text: str = self._processor.decode_pieces(known) if known else ""
        return _without_blank_pieces(text)

    def token_to_id(self, token: str) -> int | None:
        index = self._processor.piece_to_id(token)
        known = index != self._processor.unk_id() or token == self._processor.id_to_piece(index)
        return self._offset + index if known else None

    def id_to_token(self, index: int) -> str | None:
        if 0 <= index < self._offset:
            return f"<image_{index}>"
        if not 0 <= index < self.vocab_size:
            return None
        piece: str = self._processor.id_to_piece(index - self._offset)
        return piece

    def token_bytes(self, index: int) -> bytes | None:
        if index < self._offset or index in self.special_ids:
            return None
        spelled = piece_bytes(self._processor, index - self._offset)
        if spelled is None or self._processor.is_byte(index - self._offset):
            return spelled
        return _without_blank_pieces(spelled.decode("utf-8")).encode("utf-8")

    def unsettled(self, index: int, skip_special_tokens: bool) -> bool:
        piece = self.id_to_token(index)
        return piece is not None and _OPENINGS.has(piece)

    def content(self) -> bytes:
        facts = [self._offset, self._lowers, self._squeezes, sorted(self._special), sorted(self._swallowing)]
        return self._model + json.dumps(facts).encode()

    def built_files(self) -> dict[str, bytes]:
        return {}


def _with_blank_pieces(text: str) -> str:
    text = text.replace("\n", "<n>").replace("\t", _TAB)
    for blank, spaces in reversed(_BLANKS.items()):
        text = text.replace(spaces, blank)
    return text


def _without_blank_pieces(text: str) -> str:
    text = text.replace("<n>", "\n").replace(_TAB, "\t")
    for blank, spaces in _BLANKS.items():
        text = text.replace(blank, spaces)
    return text


def _image_tokens(config: Mapping[str, Any], where: str) -> int:
    value = config.get("num_image_tokens", 20000)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MAX_IMAGE_TOKENS:
        raise CheckpointError(
            f"num_image_tokens is {value!r}, not a number from 0 to {_MAX_IMAGE_TOKENS:,}",
            where=where,
            fix="ChatGLM-6B's tokenizer_config.json has 0, its first releases 20000",
        )
    return value


def _extension() -> bytes:
    """The pieces of `CONTROLS`, blanks and bytes as protobuf wire bytes: appended to a serialized model they join its
    own pieces (a repeated field), and `byte_fallback` (field 35 of trainer_spec, field 2) is set."""
    kinds: list[tuple[Iterable[str], int]] = [
        (CONTROLS, _CONTROL),
        ((_TAB, *_BLANKS), _USER_DEFINED),
        ((f"<0x{byte:02X}>" for byte in range(256)), _BYTE),
    ]
    wire = b"".join(_piece(text, kind) for texts, kind in kinds for text in texts)
    return wire + b"\x12\x03\x98\x02\x01"


def _piece(text: str, kind: int) -> bytes:
    body = (
        b"\x0a" + bytes([len(text)]) + text.encode("ascii") + b"\x15" + struct.pack("<f", 0.0) + b"\x18" + bytes([kind])
    )
    return b"\x0a" + bytes([len(body)]) + body
