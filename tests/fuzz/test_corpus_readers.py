"""Readers of raw corpora, token files and saved indices of samples against damaged files (see ``damage.py``)."""

from __future__ import annotations

import gzip
import json
import shutil
import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from fuzz.damage import Reader, check, fuzz
from oarsmith.data.corpus.documents import Document, Malformed, Passed, read_documents, rows_before
from oarsmith.data.corpus.files import Layout, find_files, plan_pieces
from oarsmith.data.corpus.indexed import IndexedBuilder
from oarsmith.data.corpus.loader import CorpusLoader, make_corpus_batch
from oarsmith.data.corpus.parts import Corpus

SEQUENCES = [[5, 6, 7], [8], [], [9, 10], [11, 3], list(range(40)), [7]]
DOC_IDX = [0, 2, 3, 5, 6, 7]
TEXTS = ["A line of text.", "", "Zwei Zeilen\nmit Umlauten: äöü", "x" * 90, "第三个文档。", "end"]
SEQ_LEN = 8


def open_corpus(folder: Path) -> Corpus:
    return Corpus(str(folder / "text"), shares=(1, 0, 0), seq_len=SEQ_LEN)


def read_pair(folder: Path) -> None:
    """Every sequence and document, then all samples of two epochs as batches, as a run reads them."""
    corpus = open_corpus(folder)
    (file,) = corpus.files
    assert sum(len(file.read(index)) for index in range(len(file))) == file.num_tokens
    assert [len(file.read_document(d)) for d in range(file.num_documents)] == file.document_lengths.tolist()
    assert len(file.fingerprint) == 64 and corpus.highest_id(None)[0] >= corpus.highest_id(1)[0]
    part = corpus.draw("train", max(1, 2 * corpus.samples_in_pass("train")), seed=0)
    for number in range(min(part.num_samples, 64)):
        make_corpus_batch([part.row(number)], isolate_documents=False, vocab_size=50)


def read_cached(folder: Path) -> None:
    """A damaged index is built again: the samples are the same, whatever is in the files."""
    rows = samples(folder)
    assert all(np.array_equal(row, expected) for row, expected in zip(rows, samples_of(folder), strict=True))


def samples(folder: Path) -> list[np.ndarray]:
    loader = CorpusLoader(
        open_corpus(folder).draw("train", 12, seed=0), rows_per_batch=1, isolate_documents=False, vocab_size=50
    )
    return [loader.batch_at(0, index).input_ids.numpy() for index in range(loader.batches_per_epoch())]


def samples_of(folder: Path) -> list[np.ndarray]:
    """The same without what is saved."""
    shutil.copytree(folder, folder / "bare", ignore=shutil.ignore_patterns("index-cache"))
    return samples(folder / "bare")


def read_texts(folder: Path) -> None:
    """All documents of the one file, in small pieces."""
    layout = Layout()
    files, _ = find_files([str(path) for path in folder.iterdir()])
    for piece in plan_pieces(files, layout, 64):
        rows_before(piece)
        for document in read_documents(piece, layout, Passed()):
            assert document.place >= 1
            piece.where(document.place)


def write_pair(prefix: Path) -> None:
    with IndexedBuilder(prefix, np.dtype("<u2")) as builder:
        for first, stop in pairwise(DOC_IDX):
            for sequence in SEQUENCES[first:stop]:
                builder.add(sequence)
            builder.end_document()


def write_lazy(prefix: Path) -> None:
    sizes = [len(sequence) for sequence in SEQUENCES]
    tokens, num = [token for sequence in SEQUENCES for token in sequence], len(sizes)
    prefix.with_name("text.bin").write_bytes(struct.pack(f"<{len(tokens)}i", *tokens))
    prefix.with_name("text.idx").write_bytes(
        b"TNTIDX\x00\x00"
        + struct.pack("<QQQQQQ", 1, 4, 4, num, num, len(DOC_IDX))
        + struct.pack(f"<{num + 1}q", *range(num + 1))
        + struct.pack(f"<{num + 1}q", *np.cumsum([0, *sizes]))
        + struct.pack(f"<{num}i", *sizes)
        + struct.pack(f"<{len(DOC_IDX)}q", *DOC_IDX)
    )


def write_numpy(prefix: Path) -> None:
    np.save(f"{prefix}_ids.npy", np.array([token for sequence in SEQUENCES for token in sequence], "<u2"))
    lens = np.array([len(sequence) for sequence in SEQUENCES], np.int32)
    np.savez(f"{prefix}_idx.npz", lens=lens, docs=np.array(DOC_IDX))


def make_token_files(root: Path) -> dict[str, Reader]:
    for name, write in (("pair", write_pair), ("lazy", write_lazy), ("numpy", write_numpy), ("cached", write_pair)):
        (root / name).mkdir()
        write(root / name / "text")
    samples(root / "cached")
    cached = {path.stem.partition("_")[2] or "dsc": path.name for path in (root / "cached" / "index-cache").iterdir()}
    return {
        "idx": Reader(root / "pair", "text.idx", read_pair),
        "bin": Reader(root / "pair", "text.bin", read_pair),
        "lazy idx": Reader(root / "lazy", "text.idx", read_pair),
        "lazy bin": Reader(root / "lazy", "text.bin", read_pair),
        "numpy ids": Reader(root / "numpy", "text_ids.npy", read_pair),
        "numpy idx": Reader(root / "numpy", "text_idx.npz", read_pair),
        **{f"cache {kind}": Reader(root / "cached", f"index-cache/{n}", read_cached) for kind, n in cached.items()},
    }


def make_texts(root: Path) -> dict[str, Reader]:
    lines = "".join(json.dumps({"text": text, "id": 1}, ensure_ascii=False) + "\n" for text in TEXTS).encode()
    frames = [zstandard.ZstdCompressor().compress(part) for part in (lines[:200], lines[200:])]
    contents = {
        "jsonl": lines,
        "jsonl.zst": b"".join(frames),
        "jsonl.gz": gzip.compress(lines, mtime=0),
        "json": json.dumps([{"text": text} for text in TEXTS]).encode(),
        "txt": "\n\n".join(TEXTS).encode(),
        "csv": ("id,text\n" + "".join(f'{n},"{text}"\n' for n, text in enumerate(TEXTS))).encode(),
    }
    found = {}
    for kind, content in contents.items():
        (root / kind).mkdir()
        (root / kind / f"rows.{kind}").write_bytes(content)
        found[kind] = Reader(root / kind, f"rows.{kind}", read_texts)
    for kind, codec in (("parquet", "none"), ("parquet zstd", "zstd")):
        (root / kind).mkdir()
        table = pyarrow.table({"text": [*TEXTS, None], "id": list(range(7))})
        pyarrow.parquet.write_table(table, root / kind / "rows.parquet", row_group_size=3, compression=codec)
        found[kind] = Reader(root / kind, "rows.parquet", read_texts)
    return found


KINDS = (
    *("idx", "bin", "lazy idx", "lazy bin", "numpy ids", "numpy idx"),
    *("cache dsc", "cache doc_idx", "cache sample_idx", "cache shuffle_idx"),
    *("jsonl", "jsonl.zst", "jsonl.gz", "json", "txt", "csv", "parquet", "parquet zstd"),
)


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reader]:
    root = tmp_path_factory.mktemp("fuzz")
    return make_token_files(root) | make_texts(root)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(kind: str, readers: dict[str, Reader], tmp_path: Path) -> None:
    assert readers.keys() == set(KINDS)
    fuzz(readers[kind], tmp_path, 1 / len(KINDS))


FOUND: dict[str, tuple[str, list[tuple]]] = {
    "a header of numpy that does not end": ("numpy ids", [("splice", 0.0, (0.0, 25))]),
    "a member of a zip file that seems encrypted": ("numpy idx", [("flip", 0.7890625, 0)]),
    "a member of a zip file packed in an unknown way": ("numpy idx", [("number", 0.7890625, (255, 1))]),
    "a broken block of gzip": ("jsonl.gz", [("digit", 0.0, b"1e9")]),
    "a text of parquet that is not UTF-8": ("parquet", [("byte", 0.03125, 128)]),
}


@pytest.mark.parametrize("name", FOUND)
def test_damage_that_once_got_through(name: str, readers: dict[str, Reader], tmp_path: Path) -> None:
    kind, changes = FOUND[name]
    check(readers[kind], changes, tmp_path / "damaged")


def test_a_text_of_parquet_that_is_not_utf8_is_one_row_lost(readers: dict[str, Reader], tmp_path: Path) -> None:
    """The others are read."""
    damaged = tmp_path / "rows.parquet"
    damaged.write_bytes((readers["parquet"].folder / "rows.parquet").read_bytes().replace(b"A line", b"\x80 line"))
    (piece,) = plan_pieces([damaged], Layout(), 1 << 20)
    found = list(read_documents(piece, Layout(), Passed()))
    assert [item.text for item in found if isinstance(item, Document)] == TEXTS[1:]
    first, last = (item for item in found if isinstance(item, Malformed))
    assert (first.place, last.place) == (1, 7)
    assert "not UTF-8 (byte 0 of the line: 0x80)" in first.what and "null" in last.what
