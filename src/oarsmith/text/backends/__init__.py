"""Tokenizer backends: text to ids and back, one file a format. `Backend` is what `Tokenizer` needs of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Backend(Protocol):
    """A tokenizer without chat templates, files or names."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that `decode` leaves out with skip_special_tokens."""

    @property
    def added_ids(self) -> frozenset[int]:
        """Ids of tokens that are cut out of text before the model sees it, special or not."""

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        """Ids of each text."""

    def encode_content(self, text: str) -> list[int]:
        """Ids of a text that a template sets apart from its control tokens (see `rendered.py`)."""

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids without special tokens and the [start, end) characters each stands for."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Text of ids; ids outside the vocabulary give nothing; bytes that are no UTF-8 give U+FFFD."""

    def token_to_id(self, token: str) -> int | None:
        """Id of a token's exact text."""

    def id_to_token(self, index: int) -> str | None:
        """Text of a token as the vocabulary spells it."""

    def token_bytes(self, index: int) -> bytes | None:
        """UTF-8 bytes that a token adds to a text that others stand before; None: it is special, or no token."""

    def unsettled(self, index: int, skip_special_tokens: bool) -> bool:
        """True if what follows this id may change the text decoded so far (by more than an unfinished character)."""

    def content(self) -> bytes:
        """Everything that decides ids and text, for fingerprints."""

    def built_files(self) -> dict[str, bytes]:
        """Files to save beside the original ones, because this backend was built from others."""
