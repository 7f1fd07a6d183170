"""Lazy pairs and numpy pairs read like the same content in a .bin/.idx pair."""

from __future__ import annotations

import pickle
import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from oarsmith.data.corpus.indexed import IndexedBuilder, IndexedDataset
from oarsmith.data.corpus.legacy import LazyDataset, NumpyDataset, open_tokens
from oarsmith.errors import DataError

SEQUENCES = [[5, 6, 7], [8], [], [9, 10], [11]]
DOC_IDX = [0, 2, 3, 5]


def write_lazy(
    prefix: Path, *, sizes_letter="i", magic=b"TNTIDX\x00\x00", version=1, code=4, width=4, **changed
) -> Path:
    """The layout value by value, as the libraries that write it do."""
    sizes = changed.get("sizes", [len(sequence) for sequence in SEQUENCES])
    ends = np.cumsum([0, *(len(sequence) for sequence in SEQUENCES)]).tolist()
    starts = changed.get("starts", ends)
    num = len(SEQUENCES)
    Path(f"{prefix}.bin").write_bytes(struct.pack("<7i", *(token for sequence in SEQUENCES for token in sequence)))
    Path(f"{prefix}.idx").write_bytes(
        magic
        + struct.pack("<QQQQQQ", version, code, width, num, len(sizes), len(DOC_IDX))
        + struct.pack(f"<{num + 1}q", *range(num + 1))
        + struct.pack(f"<{num + 1}q", *starts)
        + struct.pack(f"<{len(sizes)}{sizes_letter}", *sizes)
        + struct.pack(f"<{len(DOC_IDX)}q", *DOC_IDX)
    )
    return prefix


def write_numpy(prefix: Path, dtype="u2", **changed) -> Path:
    tokens = np.array([token for sequence in SEQUENCES for token in sequence], dtype=dtype)
    np.save(f"{prefix}_ids.npy", changed.get("ids", tokens))
    lens = np.array([len(sequence) for sequence in SEQUENCES], dtype=np.int32)
    np.savez(
        f"{prefix}_idx.npz", **{"lens": lens, "sents": lens, "docs": np.array(DOC_IDX), **changed.get("index", {})}
    )
    return prefix


def assert_same_content(dataset, tmp_path):
    with IndexedBuilder(tmp_path / "same", dataset.dtype) as builder:
        for first, stop in pairwise(DOC_IDX):
            for sequence in SEQUENCES[first:stop]:
                builder.add(sequence)
            builder.end_document()
    same = IndexedDataset(tmp_path / "same")
    assert [dataset.read(n).tolist() for n in range(len(dataset))] == SEQUENCES
    assert [dataset.read_document(n).tolist() for n in range(3)] == [same.read_document(n).tolist() for n in range(3)]
    assert dataset.read(0, 1, 1).tolist() == [6]
    assert dataset.document_lengths.tolist() == same.document_lengths.tolist() == [4, 0, 3]
    assert (dataset.num_tokens, dataset.highest_id(), dataset.notes) == (7, 11, ())
    assert len(dataset.fingerprint) == 64


@pytest.mark.parametrize("letter", ["i", "q"])
def test_a_lazy_pair_with_narrow_or_wide_sizes(tmp_path, letter):
    dataset = open_tokens(write_lazy(tmp_path / "lazy", sizes_letter=letter))
    assert isinstance(dataset, LazyDataset)
    assert_same_content(dataset, tmp_path)


@pytest.mark.parametrize("dtype", ["u2", "i4", "i8"])
def test_a_numpy_pair(tmp_path, dtype):
    dataset = open_tokens(write_numpy(tmp_path / "old", dtype))
    assert isinstance(dataset, NumpyDataset)
    assert_same_content(dataset, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 3}, "version 3"),
        ({"code": 6}, "dtype code 6"),
        ({"width": 8}, "8 bytes a token"),
        ({"sizes": [1]}, "5 sequences have 1 sizes"),
        ({"sizes": [3, 1, 0, 2, 2]}, "sequence 4 has 2 tokens, but the next one starts after 1"),
        ({"sizes": [3, 1, 0, 2, 2], "starts": [0, 3, 4, 4, 6, 8]}, "sequence 4 is 2 tokens from byte 24"),
    ],
)
def test_a_broken_lazy_pair(tmp_path, changes, message):
    write_lazy(tmp_path / "lazy", **changes)
    with pytest.raises(DataError, match=message) as caught:
        open_tokens(tmp_path / "lazy")
    assert caught.value.where == str(tmp_path / "lazy.idx") and caught.value.fix


@pytest.mark.parametrize("letter", ["i", "q"])
def test_every_truncation_of_a_lazy_index_is_refused(tmp_path, letter):
    prefix = write_lazy(tmp_path / "lazy", sizes_letter=letter)
    whole = Path(f"{prefix}.idx").read_bytes()
    for length in range(len(whole)):
        Path(f"{prefix}.idx").write_bytes(whole[:length])
        with pytest.raises(DataError):
            open_tokens(prefix)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": np.zeros((2, 3), dtype=np.int32)}, "array \\(2, 3\\)"),
        ({"ids": np.zeros(7, dtype=np.float32)}, "float32"),
        ({"ids": np.zeros(6, dtype=np.int32)}, "sequence 4 is 1 tokens"),
        ({"index": {"lens": np.zeros((2, 2), dtype=np.int32)}}, "'lens' is \\(2, 2\\)"),
        ({"index": {"docs": np.array([0, 9])}}, "documents end at sequence 9, but there are 5"),
        ({"index": {"docs": np.array([None])}}, "not an index"),
    ],
)
def test_a_broken_numpy_pair(tmp_path, changes, message):
    write_numpy(tmp_path / "old", **changes)
    with pytest.raises(DataError, match=message):
        open_tokens(tmp_path / "old")


def test_pickles_are_never_loaded(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    write_numpy(tmp_path / "old", ids=np.array([Bomb()], dtype=object))
    with pytest.raises(DataError, match="not an array of tokens"):
        open_tokens(tmp_path / "old")
    (tmp_path / "old_idx.npz").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(DataError, match="not an index"):
        open_tokens(tmp_path / "old")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("end", ["_ids.npy", "_idx.npz"])
@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"PK\x03\x04", b"something else"])
def test_damaged_numpy_files(tmp_path, end, content):
    write_numpy(tmp_path / "old")
    Path(f"{tmp_path / 'old'}{end}").write_bytes(content)
    with pytest.raises(DataError, match=end):
        open_tokens(tmp_path / "old")


def test_nothing_there(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        open_tokens(tmp_path / "none")
