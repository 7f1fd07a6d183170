"""Token files: one ``.bin`` of tokens end to end and one ``.idx`` that says where each sequence and document lies.

The layout of ``.idx``, little endian, is Megatron-LM's (``megatron/core/datasets/indexed_dataset.py``) byte for byte:

    magic "MMIDIDX\\0\\0" (9 bytes) · u64 version = 1 · u8 dtype code · u64 number of sequences n · u64 length m of
    doc_idx · int32 sizes[n] (tokens) · int64 offsets[n] (bytes into .bin) · int64 doc_idx[m]

Document d is the sequences doc_idx[d] to doc_idx[d + 1] - 1; doc_idx goes from 0 to n. What follows (Megatron's modes
of multimodal data) is left alone.
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from oarsmith.atomic import atomic_file
from oarsmith.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
# 6 and 7 are floats, which of them single and which double changed between versions: no tokens in either.
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2", 9: "<u4", 10: "<u8"}
_CODES = {np.dtype(name): code for code, name in DTYPES.items()}
_BLOCK = 1 << 22
_PAGE = 4096
_REWRITE = "write the pair again with 'oarsmith preprocess', or copy it again if it was cut off on the way"

Array = npt.NDArray[np.integer]


def idx_path(prefix: Path) -> Path:
    """``<prefix>.idx``."""
    return prefix.with_name(prefix.name + ".idx")


def bin_path(prefix: Path) -> Path:
    """``<prefix>.bin``."""
    return prefix.with_name(prefix.name + ".bin")


def token_dtype(vocab_size: int) -> np.dtype:
    """What holds the ids of a vocabulary: uint16 below 65,535 entries, else int32 (the rule of Megatron's tools)."""
    return np.dtype("<u2" if vocab_size < 65535 else "<i4")


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
            raise DataError("the index lists no sequence", where=str(index_file), fix=_REWRITE)
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
            raise DataError(f"the first document's start is {first}, not 0", where=where, fix=_REWRITE)
        steps = np.diff(doc_idx)
        if steps.min() < 0:
            at = int(np.argmax(steps < 0))
            what = f"document {at} ends at sequence {doc_idx[at + 1]}, before its start {doc_idx[at]}"
            raise DataError(what, where=where, fix=_REWRITE)
        if doc_idx[-1] != num:
            what = f"the documents end at sequence {doc_idx[-1]}, but there are {num}"
            raise DataError(what, where=where, fix=_REWRITE)
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
                raise DataError(f"sequence {start + at} has {sizes[at]} tokens", where=where, fix=_REWRITE)
            falling = np.diff(offsets, prepend=np.int64(before)) < 0
            if falling.any():
                at = int(np.argmax(falling))
                what = f"sequence {start + at} starts at byte {offsets[at]}, before the one in front of it"
                raise DataError(what, where=where, fix=_REWRITE)
            if width > 1 and (offsets % width).any():
                at = int(np.argmax(offsets % width != 0))
                what = f"sequence {start + at} starts at byte {offsets[at]}, within a token of {width} bytes"
                raise DataError(what, where=where, fix=_REWRITE)
            # Compared without adding: a wild offset must not overflow.
            past = sizes * width > num_bytes - offsets
            if past.any():
                at = int(np.argmax(past))
                what = (
                    f"sequence {start + at} is {sizes[at]:,} tokens from byte {offsets[at]:,}, "
                    f"but {self._token_file.name} has {num_bytes:,} bytes of tokens"
                )
                raise DataError(what, where=where, fix=_REWRITE)
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


class IndexedDataset(StoredTokens):
    """A ``.bin`` / ``.idx`` pair. Opening reads the index; of the tokens only the file's length.

    Raises:
        DataError: a missing or malformed file; it names the file, the value and what to do.
    """

    def __init__(self, prefix: Path) -> None:
        path = idx_path(prefix)
        size = file_size(path)
        if size < HEADER.size:
            what = f"the file has {size} bytes, the header of an index {HEADER.size}"
            raise DataError(what, where=str(path), fix=_REWRITE)
        with path.open("rb") as file:
            magic, version, code, num, num_borders = HEADER.unpack(file.read(HEADER.size))
        if magic != MAGIC:
            fix = "give the path of a .bin/.idx pair that 'oarsmith preprocess' or Megatron has written"
            raise DataError(f"the file starts with {magic!r}, an index with {MAGIC!r}", where=str(path), fix=fix)
        if version != 1:
            fix = "write the pair again with 'oarsmith preprocess', or use a newer Oarsmith"
            raise DataError(f"version {version} of the format; version 1 is known", where=str(path), fix=fix)
        if code not in DTYPES:
            what = f"dtype code {code} is not that of an integer type ({', '.join(map(str, DTYPES))})"
            raise DataError(what, where=str(path), fix=_REWRITE)
        needed = HEADER.size + 12 * num + 8 * num_borders
        if size < needed:
            what = f"{num:,} sequences and {num_borders:,} borders of documents need {needed:,} bytes, it has {size:,}"
            raise DataError(what, where=str(path), fix=_REWRITE)
        whole = map_bytes(path)
        at = np.cumsum([HEADER.size, 4 * num, 8 * num, 8 * num_borders])
        super().__init__(
            prefix,
            index_file=path,
            token_file=bin_path(prefix),
            data_start=0,
            dtype=np.dtype(DTYPES[code]),
            sizes=whole[at[0] : at[1]].view("<i4"),
            offsets=whole[at[1] : at[2]].view("<i8"),
            doc_idx=whole[at[2] : at[3]].view("<i8"),
        )


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


class IndexedBuilder:
    """Writes a ``.bin`` / ``.idx`` pair::

        with IndexedBuilder(prefix, token_dtype(vocab_size)) as builder:
            for ids in documents:
                builder.add(ids)
                builder.end_document()

    The pair appears under its name when the block ends without an exception. A process killed meanwhile leaves the old
    pair, or (between the two renames) a ``.bin`` without ``.idx``, which no reader takes for a pair.

    Raises:
        DataError: an id that the dtype cannot hold, or a block that ends without a sequence.
        CheckpointError: the disk is full.
    """

    def __init__(self, prefix: Path, dtype: npt.DTypeLike) -> None:
        self._prefix = prefix
        self._dtype = np.dtype(dtype).newbyteorder("<")
        assert self._dtype in _CODES, f"tokens as {self._dtype}"
        self._limits = np.iinfo(self._dtype)
        self._sizes = array("i")
        self._doc_idx = array("q", [0])
        self._stack = ExitStack()
        self._file: BinaryIO | None = None

    def __enter__(self) -> IndexedBuilder:
        self._file = self._stack.enter_context(atomic_file(bin_path(self._prefix)))
        return self

    def add(self, ids: Sequence[int] | Array) -> None:
        """Adds a sequence to the current document; an empty one counts too."""
        self._sizes.append(self._write(ids))

    def end_document(self) -> None:
        """Ends the current document, also one without a sequence."""
        self._doc_idx.append(len(self._sizes))

    def add_documents(self, ids: Sequence[int] | Array, sizes: Sequence[int] | Array) -> None:
        """Adds documents of one sequence each, whose tokens lie end to end in `ids`."""
        counts = np.asarray(sizes, dtype=np.int32)
        num_ids = self._write(ids)
        assert num_ids == counts.sum(dtype=np.int64), f"{num_ids} ids for sizes that add up to {counts.sum()}"
        first = len(self._sizes) + 1
        self._sizes.frombytes(counts.tobytes())
        self._doc_idx.frombytes(np.arange(first, first + len(counts), dtype=np.int64).tobytes())

    def append(self, other_prefix: Path) -> None:
        """Adds all documents of another pair.

        Raises:
            DataError: it is malformed or holds another dtype.
        """
        assert self._doc_idx[-1] == len(self._sizes), "append() within a document"
        other = IndexedDataset(other_prefix)
        if other.dtype != self._dtype:
            what = f"the tokens are {other.dtype.name}, those of {bin_path(self._prefix)} {self._dtype.name}"
            raise DataError(what, where=str(other_prefix), fix="write both with the same tokenizer, or this one anew")
        ends = other.offsets + other.sizes.astype(np.int64) * self._dtype.itemsize
        gaps = np.flatnonzero(other.offsets[1:] != ends[:-1]) + 1
        for first, stop in zip([0, *gaps.tolist()], [*gaps.tolist(), len(other)], strict=True):
            self._copy(other, int(other.offsets[first]), int(ends[stop - 1]))
        shifted = np.asarray(other.doc_idx[1:], dtype=np.int64) + len(self._sizes)
        self._sizes.frombytes(np.asarray(other.sizes, dtype=np.int32).tobytes())
        self._doc_idx.frombytes(shifted.tobytes())

    def _copy(self, other: IndexedDataset, start: int, stop: int) -> None:
        assert self._file is not None, "the builder is used outside its with block"
        with bin_path(other.prefix).open("rb") as source:
            source.seek(start)
            while start < stop:
                block = source.read(min(_BLOCK, stop - start))
                assert block, f"{other.prefix} ended at byte {start}, before {stop}: it changed while being read"
                self._file.write(block)
                start += len(block)

    def _write(self, ids: Sequence[int] | Array) -> int:
        assert self._file is not None, "the builder is used outside its with block"
        values = np.asarray(ids)
        if values.dtype != self._dtype and values.size:
            low, high = int(values.min()), int(values.max())
            if low < self._limits.min or high > self._limits.max:
                what = f"token id {low if low < self._limits.min else high} does not fit into {self._dtype.name}"
                raise DataError(what, where=str(self._prefix), fix="choose the type with token_dtype(vocab_size)")
        self._file.write(np.ascontiguousarray(values, dtype=self._dtype).data)
        return values.size

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._stack.__exit__(kind, error, traceback)
            return
        assert self._doc_idx[-1] == len(self._sizes), "sequences after the last end_document()"
        index = idx_path(self._prefix)
        with self._stack:
            if not self._sizes:
                fix = "check that the input holds documents"
                raise DataError("no sequence was added; nothing is written", where=str(self._prefix), fix=fix)
            # A new .bin must never stand beside an old .idx.
            index.unlink(missing_ok=True)
        sizes = np.frombuffer(self._sizes, dtype=np.int32)
        ends = np.cumsum(sizes, dtype=np.int64) * self._dtype.itemsize
        offsets = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
        header = HEADER.pack(MAGIC, 1, _CODES[self._dtype], len(sizes), len(self._doc_idx))
        with atomic_file(index) as file:
            file.write(header)
            for values, dtype in ((sizes, "<i4"), (offsets, "<i8"), (np.asarray(self._doc_idx), "<i8")):
                file.write(np.ascontiguousarray(values, dtype=dtype).data)
