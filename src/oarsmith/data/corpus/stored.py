"""Sequences and documents of tokens in a memory-mapped file, whatever the format of their index."""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from oarsmith.errors import DataError

REWRITE = "write the pair again with 'oarsmith preprocess', or copy it again if it was cut off on the way"
_BLOCK = 1 << 22
_PAGE = 4096

Array = npt.NDArray[np.integer]


def file_size(path: Path) -> int:
    """Bytes of a file that must be there."""
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        fix = "check the path; it is that of the pair without .bin and .idx"
        raise DataError("there is no such file", where=str(path), fix=fix) from None


def map_bytes(path: Path) -> npt.NDArray[np.uint8]:
    """A file as a read-only array of its bytes, none of them read yet."""
    if path.stat().st_size == 0:  # which cannot be mapped
        return np.empty(0, np.uint8)
    return np.memmap(path, np.uint8, "r").view(np.ndarray)


class StoredTokens:
    """Sequences of tokens in a memory-mapped file, whatever the format of their index.

    Attributes:
        prefix: path of the files without their endings.
        dtype: of the tokens, an integer type.
        sizes: int32 or int64 [n], tokens of each sequence.
        offsets: int64 [n], bytes from the start of the token file.
        doc_idx: int64 [m], ascending from 0 to n: document d is the sequences doc_idx[d] to doc_idx[d + 1] - 1.
        notes: what a reader should know about the files that is no error.

    Raises:
        DataError: an index that cannot be true of the token file.
    """

    def __init__(
        self,
        prefix: Path,
        *,
        index_file: Path,
        token_file: Path,
        data_start: int,
        dtype: np.dtype,
        sizes: Array,
        offsets: Array,
        doc_idx: Array,
    ) -> None:
        self.prefix = prefix
        self.dtype = dtype
        self.sizes = sizes
        self.offsets = offsets
        self.notes: tuple[str, ...] = ()
        self._index_file, self._token_file, self._data_start = index_file, token_file, data_start
        if len(sizes) == 0:
            raise DataError("the index lists no sequence", where=str(index_file), fix=REWRITE)
        num_bytes = file_size(token_file) - data_start
        self.doc_idx = self._checked_documents(doc_idx)
        self.num_tokens, end = self._check_bounds(num_bytes)
        if end < num_bytes:
            self.notes += (f"{token_file}: {num_bytes - end:,} bytes at the end belong to no sequence",)
        self._bytes = map_bytes(token_file)[data_start:]

    def _checked_documents(self, doc_idx: Array) -> Array:
        num, where = len(self.sizes), str(self._index_file)
        if len(doc_idx) == 1 and doc_idx[0] == 0:
            # Megatron's merge lost the borders of documents before 2023; its own GPT reader does not look at them.
            self.notes += (f"{where}: no borders of documents; each of the {num:,} sequences is taken as one",)
            return np.arange(num + 1, dtype=np.int64)
        if len(doc_idx) == 0 or doc_idx[0] != 0:
            first = doc_idx[0] if len(doc_idx) else "missing"
            raise DataError(f"the first document's start is {first}, not 0", where=where, fix=REWRITE)
        steps = np.diff(doc_idx)
        if steps.min() < 0:
            at = int(np.argmax(steps < 0))
            what = f"document {at} ends at sequence {doc_idx[at + 1]}, before its start {doc_idx[at]}"
            raise DataError(what, where=where, fix=REWRITE)
        if doc_idx[-1] != num:
            what = f"the documents end at sequence {doc_idx[-1]}, but there are {num}"
            raise DataError(what, where=where, fix=REWRITE)
        return doc_idx

    def _check_bounds(self, num_bytes: int) -> tuple[int, int]:
        """(tokens, end of the last sequence in bytes) of an index that fits the token file."""
        where, width = str(self._index_file), self.dtype.itemsize
        num_tokens = end = before = 0
        for start in range(0, len(self.sizes), _BLOCK):
            sizes = self.sizes[start : start + _BLOCK].astype(np.int64)
            offsets = self.offsets[start : start + _BLOCK]
            if sizes.min() < 0:
                at = int(np.argmax(sizes < 0))
                raise DataError(f"sequence {start + at} has {sizes[at]} tokens", where=where, fix=REWRITE)
            falling = np.diff(offsets, prepend=np.int64(before)) < 0
            if falling.any():
                at = int(np.argmax(falling))
                what = f"sequence {start + at} starts at byte {offsets[at]}, before the one in front of it"
                raise DataError(what, where=where, fix=REWRITE)
            if width > 1 and (offsets % width).any():
                at = int(np.argmax(offsets % width != 0))
                what = f"sequence {start + at} starts at byte {offsets[at]}, within a token of {width} bytes"
                raise DataError(what, where=where, fix=REWRITE)
            # Compared without adding: a wild offset must not overflow.
            past = sizes * width > num_bytes - offsets
            if past.any():
                at = int(np.argmax(past))
                what = (
                    f"sequence {start + at} is {sizes[at]:,} tokens from byte {offsets[at]:,}, "
                    f"but {self._token_file.name} has {num_bytes:,} bytes of tokens"
                )
                raise DataError(what, where=where, fix=REWRITE)
            num_tokens += int(sizes.sum())
            end, before = max(end, int((offsets + sizes * width).max())), int(offsets[-1])
        return num_tokens, end

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def num_documents(self) -> int:
        return len(self.doc_idx) - 1

    @cached_property
    def document_lengths(self) -> Array:
        """[documents] tokens of each document."""
        if self.num_documents == len(self.sizes) and bool((np.diff(self.doc_idx) == 1).all()):
            return self.sizes
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.sizes, dtype=np.int64)])
        return np.diff(ends[self.doc_idx])

    def read(self, index: int, offset: int = 0, length: int | None = None) -> Array:
        """Tokens of sequence `index` from token `offset` on, `length` of them or all: a read-only view of the file."""
        size = int(self.sizes[index])
        length = size - offset if length is None else length
        assert 0 <= offset <= offset + length <= size, f"{offset} + {length} of {size} tokens"
        start = int(self.offsets[index]) + offset * self.dtype.itemsize
        return self._bytes[start : start + length * self.dtype.itemsize].view(self.dtype)

    def read_document(self, document: int, offset: int = 0, length: int | None = None) -> Array:
        """The same of a document: a view where it is one sequence, else a copy."""
        first, stop = int(self.doc_idx[document]), int(self.doc_idx[document + 1])
        if stop - first == 1:
            return self.read(first, offset, length)
        pieces = [self.read(index) for index in range(first, stop)]
        tokens = np.concatenate(pieces) if pieces else np.empty(0, self.dtype)
        length = len(tokens) - offset if length is None else length
        assert 0 <= offset <= offset + length <= len(tokens), f"{offset} + {length} of {len(tokens)}"
        return tokens[offset : offset + length]

    def highest_id(self, num_pages: int | None = 64) -> int:
        """The highest token id in `num_pages` pages of 4 KiB spread over the token file; None reads all of it.

        With pages it is a lower bound: it finds another tokenizer's corpus at once, and may miss a single wrong token.
        """
        highest = 0
        for start, stop in self._pages(num_pages):
            page = self._bytes[start:stop].view(self.dtype)
            highest = max(highest, int(page.max()))
        return highest

    def _pages(self, num_pages: int | None) -> list[tuple[int, int]]:
        """Byte ranges of whole tokens."""
        width = self.dtype.itemsize
        total = len(self._bytes) // width * width
        if num_pages is None or total <= num_pages * _PAGE:
            return [(start, min(start + _BLOCK, total)) for start in range(0, total, _BLOCK)]
        starts = np.linspace(0, total - _PAGE, num_pages).astype(np.int64) // width * width
        return [(int(start), int(start) + _PAGE) for start in starts]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hexadecimal) over the index, the length of the token file, and 16 pages of it.

        Moving or copying the files keeps it. Tokens changed in place, in a large file, outside of these pages and
        without a change of any length, are not seen.
        """
        digest = hashlib.sha256(f"{self.dtype.str} {len(self._bytes)} {len(self)} {len(self.doc_idx)}".encode())
        for values in (self.sizes, self.offsets, self.doc_idx):
            digest.update(np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<")).data)
        for start, stop in self._pages(16):
            digest.update(self._bytes[start:stop].data)
        return digest.hexdigest()
