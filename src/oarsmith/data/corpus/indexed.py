"""Token files: one ``.bin`` of tokens end to end and one ``.idx`` that says where each sequence and document lies.

The layout of ``.idx``, little endian, is Megatron-LM's (``megatron/core/datasets/indexed_dataset.py``) byte for byte:

    magic "MMIDIDX\\0\\0" (9 bytes) · u64 version = 1 · u8 dtype code · u64 number of sequences n · u64 length m of
    doc_idx · int32 sizes[n] (tokens) · int64 offsets[n] (bytes into .bin) · int64 doc_idx[m]

Document d is the sequences doc_idx[d] to doc_idx[d + 1] - 1; doc_idx goes from 0 to n. What follows (Megatron's modes
of multimodal data) is left alone.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from oarsmith.atomic import atomic_file
from oarsmith.data.corpus.stored import REWRITE, Array, StoredTokens, file_size, map_bytes
from oarsmith.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
# 6 and 7 are floats, which of them single and which double changed between versions: no tokens in either.
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2", 9: "<u4", 10: "<u8"}
_CODES = {np.dtype(name): code for code, name in DTYPES.items()}
_BLOCK = 1 << 22


def idx_path(prefix: Path) -> Path:
    """``<prefix>.idx``."""
    return prefix.with_name(prefix.name + ".idx")


def bin_path(prefix: Path) -> Path:
    """``<prefix>.bin``."""
    return prefix.with_name(prefix.name + ".bin")


def token_dtype(vocab_size: int) -> np.dtype:
    """What holds the ids of a vocabulary: uint16 below 65,535 entries, else int32 (the rule of PaddleNLP's tools)."""
    return np.dtype("<u2" if vocab_size < 65535 else "<i4")


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
            raise DataError(what, where=str(path), fix=REWRITE)
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
            raise DataError(what, where=str(path), fix=REWRITE)
        needed = HEADER.size + 12 * num + 8 * num_borders
        if size < needed:
            what = f"{num:,} sequences and {num_borders:,} borders of documents need {needed:,} bytes, it has {size:,}"
            raise DataError(what, where=str(path), fix=REWRITE)
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
