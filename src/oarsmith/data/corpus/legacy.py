"""Older token files, read only: lazy ``.bin`` / ``.idx`` pairs, and PaddleNLP 2.5's pair of numpy files.

Lazy ``.idx``, little endian (fairseq's ``IndexedDataset``, with documents added): magic "TNTIDX\\0\\0" · u64 version
1 · u64 dtype code · u64 bytes of a token · u64 number of sequences n · u64 number of sizes · u64 length m of doc_idx ·
int64 dim_offsets[n + 1] · int64 data_offsets[n + 1] (tokens) · sizes (int32 by PaddleNLP, int64 by Megatron) · int64
doc_idx[m].

Numpy pair: ``<prefix>_ids.npy`` holds all tokens; ``<prefix>_idx.npz`` has ``lens`` (tokens of each sequence) and
``docs`` (doc_idx).
"""

from __future__ import annotations

import struct
import tokenize
import zipfile
import zlib
from pathlib import Path

import numpy as np

from oarsmith.data.corpus.indexed import DTYPES, IndexedDataset, bin_path, idx_path
from oarsmith.data.corpus.stored import REWRITE, StoredTokens, file_size, map_bytes
from oarsmith.errors import DataError

LAZY_MAGIC = b"TNTIDX\x00\x00"
# What numpy raises for files that are not its own: it reads headers as Python, and makes room for what they claim.
_DAMAGED = (OSError, ValueError, EOFError, SyntaxError, tokenize.TokenError, MemoryError)
_LAZY_HEADER = struct.Struct("<8sQQQQQQ")


def ids_path(prefix: Path) -> Path:
    """``<prefix>_ids.npy``."""
    return prefix.with_name(prefix.name + "_ids.npy")


def npz_path(prefix: Path) -> Path:
    """``<prefix>_idx.npz``."""
    return prefix.with_name(prefix.name + "_idx.npz")


def open_tokens(prefix: Path) -> StoredTokens:
    """The token file of a prefix, of whichever format.

    Raises:
        DataError: there is none, or it is malformed.
    """
    if not idx_path(prefix).exists() and npz_path(prefix).exists():
        return NumpyDataset(prefix)
    file_size(idx_path(prefix))
    with idx_path(prefix).open("rb") as file:
        lazy = file.read(len(LAZY_MAGIC)) == LAZY_MAGIC
    return LazyDataset(prefix) if lazy else IndexedDataset(prefix)


class LazyDataset(StoredTokens):
    """A lazy ``.bin`` / ``.idx`` pair.

    Raises:
        DataError: a missing or malformed file.
    """

    def __init__(self, prefix: Path) -> None:
        path = idx_path(prefix)
        size = file_size(path)
        if size < _LAZY_HEADER.size:
            what = f"the file has {size} bytes, the header of an index {_LAZY_HEADER.size}"
            raise DataError(what, where=str(path), fix=REWRITE)
        whole = map_bytes(path)
        magic, version, code, width, num, num_sizes, num_borders = _LAZY_HEADER.unpack(
            whole[: _LAZY_HEADER.size].tobytes()
        )
        if magic != LAZY_MAGIC or version != 1:
            what = f"the file starts with {magic!r}, version {version}; a lazy index with {LAZY_MAGIC!r}, version 1"
            raise DataError(what, where=str(path), fix=REWRITE)
        if code not in DTYPES or np.dtype(DTYPES[code]).itemsize != width:
            what = f"dtype code {code} with {width} bytes a token is not that of an integer type"
            raise DataError(what, where=str(path), fix=REWRITE)
        if num_sizes != num:
            what = f"{num:,} sequences have {num_sizes:,} sizes; only sequences of one dimension are tokens"
            raise DataError(what, where=str(path), fix=REWRITE)
        fixed = _LAZY_HEADER.size + 16 * (num + 1) + 8 * num_borders
        # Nothing in the header tells the two kinds of sizes apart; the length of the file does.
        sizes_type = "<i8" if size >= fixed + 8 * num else "<i4"
        needed = fixed + np.dtype(sizes_type).itemsize * num
        if size < needed:
            what = f"{num:,} sequences and {num_borders:,} borders of documents need {needed:,} bytes, it has {size:,}"
            raise DataError(what, where=str(path), fix=REWRITE)
        parts = [8 * (num + 1), 8 * (num + 1), np.dtype(sizes_type).itemsize * num, 8 * num_borders]
        at = np.cumsum([_LAZY_HEADER.size, *parts])
        starts = whole[at[1] : at[2]].view("<i8")
        sizes = whole[at[2] : at[3]].view(sizes_type)
        if num and not np.array_equal(np.diff(starts), sizes):
            wrong = int(np.argmax(np.diff(starts) != sizes))
            what = f"sequence {wrong} has {sizes[wrong]} tokens, but the next one starts after {np.diff(starts)[wrong]}"
            raise DataError(what, where=str(path), fix=REWRITE)
        super().__init__(
            prefix,
            index_file=path,
            token_file=bin_path(prefix),
            data_start=0,
            dtype=np.dtype(DTYPES[code]),
            sizes=sizes,
            offsets=starts[:-1] * width,
            doc_idx=whole[at[3] : at[4]].view("<i8"),
        )


class NumpyDataset(StoredTokens):
    """A ``_ids.npy`` / ``_idx.npz`` pair. Pickled content is never loaded.

    Raises:
        DataError: a missing or malformed file.
    """

    def __init__(self, prefix: Path) -> None:
        ids, index = ids_path(prefix), npz_path(prefix)
        for path in (ids, index):
            file_size(path)
        try:
            with np.load(index, allow_pickle=False) as arrays:
                sizes, doc_idx = arrays["lens"], arrays["docs"].astype(np.int64)
        # RuntimeError: a damaged bit may say that a member is encrypted, or packed in a way zipfile does not know.
        except (*_DAMAGED, KeyError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:
            raise DataError(f"not an index of a corpus: {error}", where=str(index), fix=REWRITE) from error
        try:
            tokens = np.lib.format.open_memmap(ids, mode="r")
        except _DAMAGED as error:
            raise DataError(f"not an array of tokens: {error}", where=str(ids), fix=REWRITE) from error
        if tokens.dtype.kind not in "iu" or tokens.ndim != 1:
            what = f"an array {tokens.shape} of {tokens.dtype}; tokens are one row of integers"
            raise DataError(what, where=str(ids), fix=REWRITE)
        if sizes.ndim != 1 or sizes.dtype.kind not in "iu" or doc_idx.ndim != 1:
            what = f"'lens' is {sizes.shape} of {sizes.dtype}, 'docs' {doc_idx.shape}; both are rows of integers"
            raise DataError(what, where=str(index), fix=REWRITE)
        ends = np.cumsum(sizes, dtype=np.int64) * tokens.dtype.itemsize
        super().__init__(
            prefix,
            index_file=index,
            token_file=ids,
            data_start=tokens.offset,
            dtype=tokens.dtype,
            sizes=sizes,
            offsets=np.concatenate([np.zeros(1, np.int64), ends[:-1]]) if len(ends) else ends,
            doc_idx=doc_idx,
        )
