"""Pairs of .bin and .idx: read back what was written, byte for byte as the format says, and refuse what is broken."""

from __future__ import annotations

import os
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oarsmith.data.corpus.indexed import IndexedBuilder, IndexedDataset, bin_path, idx_path, token_dtype
from oarsmith.errors import DataError

DOCUMENTS = [[[5, 6, 7], [8]], [[9, 10]], [[]], [[11], [12, 13], [14]]]


def write(prefix: Path, documents=DOCUMENTS, dtype=np.uint16) -> Path:
    with IndexedBuilder(prefix, dtype) as builder:
        for document in documents:
            for sequence in document:
                builder.add(sequence)
            builder.end_document()
    return prefix


def read_by_struct(prefix: Path) -> tuple[list[list[int]], list[int]]:
    """(sequences, doc_idx), read value by value as the description of the format has it."""
    letters = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 8: "H", 9: "I", 10: "Q"}
    data = Path(f"{prefix}.idx").read_bytes()
    tokens = Path(f"{prefix}.bin").read_bytes()
    assert data[:9] == b"MMIDIDX\x00\x00"
    version, code, num, borders = struct.unpack_from("<QBQQ", data, 9)
    assert version == 1
    assert len(data) == 34 + 12 * num + 8 * borders
    sizes = struct.unpack_from(f"<{num}i", data, 34)
    offsets = struct.unpack_from(f"<{num}q", data, 34 + 4 * num)
    doc_idx = struct.unpack_from(f"<{borders}q", data, 34 + 12 * num)
    return [
        list(struct.unpack_from(f"<{n}{letters[code]}", tokens, at)) for n, at in zip(sizes, offsets, strict=True)
    ], [*doc_idx]


def write_by_struct(prefix: Path, sequences, doc_idx, *, code=8, letter="H", **changed) -> Path:
    """A pair as Megatron writes it; `changed` replaces a part: magic, version, sizes, offsets, tokens."""
    sizes = changed.get("sizes", [len(sequence) for sequence in sequences])
    width = struct.calcsize(letter)
    starts = [sum(map(len, sequences[:at])) * width for at in range(len(sequences))]
    offsets = changed.get("offsets", starts)
    flat = [token for sequence in sequences for token in sequence]
    prefix.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{prefix}.bin").write_bytes(changed.get("tokens", struct.pack(f"<{len(flat)}{letter}", *flat)))
    Path(f"{prefix}.idx").write_bytes(
        changed.get("magic", b"MMIDIDX\x00\x00")
        + struct.pack("<QBQQ", changed.get("version", 1), code, len(sizes), len(doc_idx))
        + struct.pack(f"<{len(sizes)}i", *sizes)
        + struct.pack(f"<{len(offsets)}q", *offsets)
        + struct.pack(f"<{len(doc_idx)}q", *doc_idx)
    )
    return prefix


def contents(dataset) -> list[list[int]]:
    return [dataset.read(index).tolist() for index in range(len(dataset))]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.lists(st.integers(0, 255), max_size=5), max_size=4), min_size=1, max_size=6).filter(any),
    st.sampled_from(["u1", "i2", "i4", "i8", "u2", "u4", "u8"]),
)
def test_what_is_written_is_read_back(tmp_path_factory, documents, dtype):
    prefix = write(tmp_path_factory.mktemp("corpus") / "a.b", documents, np.dtype(dtype))
    sequences = [sequence for document in documents for sequence in document]
    borders = np.cumsum([0, *map(len, documents)]).tolist()
    assert read_by_struct(prefix) == (sequences, borders)
    dataset = IndexedDataset(prefix)
    assert dataset.dtype == dtype and dataset.num_tokens == sum(map(len, sequences))
    assert dataset.sizes.dtype == np.int32 and dataset.doc_idx.dtype == np.int64
    assert len(dataset) == len(sequences) and dataset.doc_idx.tolist() == borders
    assert contents(dataset) == sequences
    joined = [[*chain.from_iterable(document)] for document in documents]
    assert [dataset.read_document(d).tolist() for d in range(dataset.num_documents)] == joined
    assert dataset.document_lengths.tolist() == [len(document) for document in joined]
    assert dataset.highest_id() == max([0, *chain.from_iterable(joined)])


@pytest.mark.parametrize(("code", "letter"), [(1, "B"), (3, "h"), (4, "i"), (5, "q"), (8, "H"), (9, "I"), (10, "Q")])
def test_files_of_others_are_read(tmp_path, code, letter):
    prefix = write_by_struct(tmp_path / "other", [[1, 2, 3], [], [100]], [0, 2, 2, 3], code=code, letter=letter)
    dataset = IndexedDataset(prefix)
    assert contents(dataset) == [[1, 2, 3], [], [100]]
    assert dataset.document_lengths.tolist() == [3, 0, 1]
    assert dataset.notes == ()


def test_parts_of_sequences_and_documents(tmp_path):
    dataset = IndexedDataset(write(tmp_path / "c"))
    assert dataset.read(0, 1).tolist() == [6, 7]
    assert dataset.read(0, 1, 1).tolist() == [6]
    assert dataset.read(3).tolist() == []
    assert dataset.read_document(0, 2, 2).tolist() == [7, 8]
    assert dataset.read_document(3, 1).tolist() == [12, 13, 14]
    assert not dataset.read(0).flags.writeable
    with pytest.raises(AssertionError, match="1 \\+ 3 of 3"):
        dataset.read(0, 1, 3)


def test_add_documents_is_add_and_end_document(tmp_path):
    documents = [[[1, 2]], [[]], [[3]]]
    one = write(tmp_path / "one", documents)
    with IndexedBuilder(tmp_path / "two", np.uint16) as builder:
        builder.add_documents(np.array([1, 2], dtype=np.uint16), [2])
        builder.add_documents([3], np.array([0, 1]))
    for path in (bin_path, idx_path):
        assert path(one).read_bytes() == path(tmp_path / "two").read_bytes()


def test_append_is_writing_all_at_once(tmp_path):
    first, second = write(tmp_path / "1"), write(tmp_path / "2", [[[1]], [[2, 3], [4]]])
    with IndexedBuilder(tmp_path / "merged", np.uint16) as builder:
        builder.append(first)
        builder.append(second)
    write(tmp_path / "at once", [*DOCUMENTS, [[1]], [[2, 3], [4]]])
    for path in (bin_path, idx_path):
        assert path(tmp_path / "merged").read_bytes() == path(tmp_path / "at once").read_bytes()


def test_append_closes_gaps_and_leaves_what_belongs_to_no_sequence(tmp_path):
    gaps = write_by_struct(
        tmp_path / "gaps", [[1, 2], [3]], [0, 1, 2], offsets=[2, 8], tokens=struct.pack("<7H", 99, 1, 2, 99, 3, 99, 99)
    )
    assert contents(IndexedDataset(gaps)) == [[1, 2], [3]]
    assert "4 bytes at the end belong to no sequence" in IndexedDataset(gaps).notes[0]
    with IndexedBuilder(tmp_path / "merged", np.uint16) as builder:
        builder.append(gaps)
        builder.append(gaps)
    assert bin_path(tmp_path / "merged").read_bytes() == struct.pack("<6H", 1, 2, 3, 1, 2, 3)
    assert contents(IndexedDataset(tmp_path / "merged")) == [[1, 2], [3]] * 2


def test_append_refuses_another_dtype(tmp_path):
    write(tmp_path / "wide", dtype=np.int32)
    with pytest.raises(DataError, match=r"int32.*uint16"), IndexedBuilder(tmp_path / "m", np.uint16) as builder:
        builder.append(tmp_path / "wide")
    assert not list(tmp_path.glob("*m*"))


@pytest.mark.parametrize("wrong", [65536, -1])
def test_an_id_that_does_not_fit(tmp_path, wrong):
    with pytest.raises(DataError, match=f"token id {wrong} .*uint16"), IndexedBuilder(tmp_path / "c", "u2") as builder:
        builder.add([1, wrong])
    assert list(tmp_path.iterdir()) == []


def test_nothing_added(tmp_path):
    with pytest.raises(DataError, match="no sequence"), IndexedBuilder(tmp_path / "c", np.uint16) as builder:
        builder.end_document()
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_document_is_a_mistake_of_the_caller(tmp_path):
    with pytest.raises(AssertionError, match="end_document"), IndexedBuilder(tmp_path / "c", np.uint16) as builder:
        builder.add([1])


def test_a_failed_build_leaves_the_old_pair(tmp_path):
    write(tmp_path / "c")
    before = [path(tmp_path / "c").read_bytes() for path in (bin_path, idx_path)]
    with pytest.raises(KeyboardInterrupt), IndexedBuilder(tmp_path / "c", np.uint16) as builder:
        builder.add([1])
        raise KeyboardInterrupt
    assert [path(tmp_path / "c").read_bytes() for path in (bin_path, idx_path)] == before
    assert len(list(tmp_path.iterdir())) == 2


def test_a_killed_build_leaves_no_pair(tmp_path):
    script = f"""
    import os, signal
    from oarsmith.data.corpus.indexed import IndexedBuilder
    with IndexedBuilder(__import__("pathlib").Path({str(tmp_path / "c")!r}), "u2") as builder:
        builder.add([1] * 100000)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".tmp-")] == []


BROKEN = {
    "magic": ({"magic": b"MMIDIDY\x00\x00"}, "starts with b'MMIDIDY"),
    "version": ({"version": 2}, "version 2"),
    "float": ({"code": 6}, "dtype code 6"),
    "code": ({"code": 77}, "dtype code 77"),
    "past the end": ({"sizes": [3, 2]}, "sequence 1 is 2 tokens from byte 6, but c.bin has 8 bytes"),
    "negative size": ({"sizes": [-3, 1]}, "sequence 0 has -3 tokens"),
    "falling offsets": ({"offsets": [6, 0]}, "sequence 1 starts at byte 0, before"),
    "negative offset": ({"offsets": [-2, 6]}, "sequence 0 starts at byte -2"),
    "wild offset": ({"offsets": [0, 2**63 - 2]}, "sequence 1 is 1 tokens from byte 9,223,372"),
    "odd offset": ({"offsets": [0, 5]}, "sequence 1 starts at byte 5, within a token"),
    "no documents": ({"doc_idx": []}, "first document's start is missing"),
    "first document": ({"doc_idx": [1, 2]}, "first document's start is 1"),
    "falling documents": ({"doc_idx": [0, 2, 1, 2]}, "document 1 ends at sequence 1, before its start 2"),
    "last document": ({"doc_idx": [0, 1]}, "documents end at sequence 1, but there are 2"),
    "nothing in it": ({"sizes": [], "offsets": []}, "no sequence"),
    "no tokens": ({"tokens": b""}, "sequence 0 is 3 tokens from byte 0, but c.bin has 0 bytes"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_pair_is_refused(tmp_path, name):
    changes, message = BROKEN[name]
    changes = {"doc_idx": [0, 1, 2], **changes}
    write_by_struct(tmp_path / "c", [[1, 2, 3], [4]], **changes)
    with pytest.raises(DataError) as caught:
        IndexedDataset(tmp_path / "c")
    assert message in caught.value.what
    assert caught.value.where == str(tmp_path / "c.idx") and caught.value.fix


def test_every_truncation_of_an_index_is_refused(tmp_path):
    prefix = write_by_struct(tmp_path / "c", [[1, 2, 3], [4]], [0, 1, 2])
    whole = idx_path(prefix).read_bytes()
    IndexedDataset(prefix)
    for length in range(len(whole)):
        idx_path(prefix).write_bytes(whole[:length])
        with pytest.raises(DataError, match=rf"(the file has|it has) {length}\b"):
            IndexedDataset(prefix)


def test_a_missing_file_is_named(tmp_path):
    write(tmp_path / "c")
    bin_path(tmp_path / "c").unlink()
    with pytest.raises(DataError) as caught:
        IndexedDataset(tmp_path / "c")
    assert caught.value.where == str(tmp_path / "c.bin")
    with pytest.raises(DataError, match=r"d\.idx"):
        IndexedDataset(tmp_path / "d")


def test_lost_borders_of_documents(tmp_path):
    """Old merges wrote doc_idx [0]: sequences are what is left."""
    dataset = IndexedDataset(write_by_struct(tmp_path / "c", [[1, 2, 3], [4]], [0]))
    assert dataset.document_lengths.tolist() == [3, 1]
    assert "each of the 2 sequences" in dataset.notes[0]


def test_the_fingerprint_is_of_the_content(tmp_path):
    write(tmp_path / "c")
    before = IndexedDataset(tmp_path / "c").fingerprint
    (tmp_path / "moved").mkdir()
    for path in (bin_path, idx_path):
        shutil.copy(path(tmp_path / "c"), tmp_path / "moved" / f"other{path(tmp_path / 'c').suffix}")
    os.utime(tmp_path / "moved" / "other.bin", (0, 0))
    assert IndexedDataset(tmp_path / "moved" / "other").fingerprint == before
    seen = {before}
    for name, documents in {
        "token": [[[5, 6, 7], [8]], [[9, 10]], [[]], [[11], [12, 13], [15]]],
        "order": [DOCUMENTS[1], DOCUMENTS[0], *DOCUMENTS[2:]],
        "borders": [[[5, 6, 7]], [[8], [9, 10]], [[]], [[11], [12, 13], [14]]],
        "one more": [*DOCUMENTS, [[1]]],
    }.items():
        seen.add(IndexedDataset(write(tmp_path / name, documents)).fingerprint)
    seen.add(IndexedDataset(write(tmp_path / "dtype", dtype=np.int16)).fingerprint)
    assert len(seen) == 6


def test_the_fingerprint_of_a_large_file_sees_other_tokens_of_the_same_lengths(tmp_path):
    rng = np.random.default_rng(0)
    for name in "ab":
        with IndexedBuilder(tmp_path / name, np.uint16) as builder:
            builder.add_documents(rng.integers(0, 60000, 500_000, dtype=np.uint16), [5000] * 100)
    assert IndexedDataset(tmp_path / "a").fingerprint != IndexedDataset(tmp_path / "b").fingerprint


def test_highest_id_of_pages_and_of_all(tmp_path):
    ids = np.full(1_000_001, 7, dtype=np.int32)
    ids[5000] = 90_000
    with IndexedBuilder(tmp_path / "c", np.int32) as builder:
        builder.add(ids)
        builder.end_document()
    dataset = IndexedDataset(tmp_path / "c")
    assert dataset.highest_id(None) == 90_000
    assert dataset.highest_id(2) == 7


def test_opening_reads_no_tokens(tmp_path):
    """A sparse .bin of 1 TiB is opened and read from at once."""
    num, size = 8, 1 << 27
    write_by_struct(
        tmp_path / "c", [], [0, num], code=4, sizes=[size] * num, offsets=[4 * size * n for n in range(num)]
    )
    with bin_path(tmp_path / "c").open("wb") as file:
        file.truncate(4 * size * num)
    dataset = IndexedDataset(tmp_path / "c")
    assert dataset.num_tokens == size * num
    assert dataset.read(7, size - 2).tolist() == [0, 0]
    assert len(dataset.fingerprint) == 64


def test_the_type_of_a_vocabulary():
    assert [token_dtype(size).name for size in (100, 65534, 65535, 200_000)] == ["uint16", "uint16", "int32", "int32"]
