"""Documents out of files: every format gives the same, cut anywhere, with true line numbers; damage is an error."""

import gzip
import json
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from oarsmith.data.corpus.documents import Document, Malformed, Passed, read_documents, rows_before
from oarsmith.data.corpus.files import Layout, find_files, plan_pieces
from oarsmith.errors import DataError

TEXTS = [f"document {n} " + "word " * (n % 7) + ("\nsecond line" if n % 3 == 0 else "") for n in range(50)]


def read(path, layout=None, size=1 << 20):
    """All documents of a path with their places in the whole file, or what is malformed."""
    layout = layout or Layout()
    found = []
    for piece in plan_pieces(find_files([str(path)])[0], layout, size):
        before = rows_before(piece)
        for one in read_documents(piece, layout, Passed()):
            found.append((piece.where(one.place + before), one.text if isinstance(one, Document) else one))
    return found


def jsonl(texts):
    return "".join(json.dumps({"text": text, "id": n}) + "\n" for n, text in enumerate(texts)).encode()


def compressed_frames(data):
    """Two frames, as parallel compressors write them."""
    half = len(data) // 2
    return b"".join(zstandard.ZstdCompressor().compress(part) for part in (data[:half], data[half:]))


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl", lambda p: p.write_bytes(jsonl(TEXTS))),
        ("a.json", lambda p: p.write_bytes(jsonl(TEXTS))),
        ("list.json", lambda p: p.write_text(json.dumps([{"text": text} for text in TEXTS]))),
        ("a.jsonl.gz", lambda p: p.write_bytes(gzip.compress(jsonl(TEXTS)))),
        ("a.jsonl.zst", lambda p: p.write_bytes(compressed_frames(jsonl(TEXTS)))),
        (
            "a.parquet",
            lambda p: pyarrow.parquet.write_table(pyarrow.table({"n": range(50), "text": TEXTS}), p, row_group_size=7),
        ),
        ("a.txt", lambda p: p.write_text("\n\n".join(TEXTS) + "\n\n\n")),
        ("a.txt.zst", lambda p: p.write_bytes(compressed_frames("\n \n".join(TEXTS).encode()))),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("size", [1, 97, 1 << 20])
def test_every_format_gives_the_same_in_pieces_of_any_size(tmp_path, name, write, size):
    write(tmp_path / name)
    assert [text for _, text in read(tmp_path / name, size=size)] == TEXTS


@pytest.mark.parametrize("size", [1, 64, 1 << 20])
def test_places_are_lines_of_the_file(tmp_path, size):
    path = tmp_path / "a.txt"
    path.write_text("\ufeff\n\nfirst\nof one\n\n\nsecond\n  \nthird", encoding="utf-8")
    found = read(path, size=size)
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    assert [text for _, text in found] == ["first\nof one", "second", "third"]
    for where, text in found:
        assert lines[int(where.rpartition(":")[2]) - 1] == text.split("\n")[0]


@pytest.mark.parametrize("size", [1, 200, 1 << 20])
def test_parquet_rows_are_counted_in_the_file(tmp_path, size):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), path, row_group_size=7)
    assert [where for where, _ in read(path, size=size)] == [f"{path}:row {n}" for n in range(1, 51)]


@pytest.mark.parametrize("size", [1, 33, 1 << 20])
def test_a_separator_a_line_and_a_file(tmp_path, size):
    path = tmp_path / "a.txt"
    path.write_text("one\n\nmore\n ### \ntwo\n###\n###\nthree\n")

    def texts(**layout):
        return [text for _, text in read(path, Layout(**layout), size)]

    assert texts(separator="###") == ["one\n\nmore", "two", "three"]
    assert texts(text_documents="line") == ["one", "more", " ### ", "two", "###", "###", "three"]
    assert texts(text_documents="file") == ["one\n\nmore\n ### \ntwo\n###\n###\nthree"]


def test_random_text_files_cut_at_random_places(tmp_path):
    randomly = random.Random(0)
    for number in range(30):
        lines = [randomly.choice(["", " ", "a", "bb", "中文", "x" * 30]) for _ in range(randomly.randrange(40))]
        path = tmp_path / f"{number}.txt"
        path.write_text("\n".join(lines), encoding="utf-8")
        if path.stat().st_size:
            assert read(path, size=randomly.randrange(1, 50)) == read(path)


def test_malformed_rows_say_what_is_wrong(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"text": "fine"}\n\n{"text": 3}\n{"body": "x"}\n[1]\n{"text": "cut\n{"text": "\xff"}\n{"text": null}\n'
    )
    found = read(path, size=5)
    assert [where.rpartition(":")[2] for where, _ in found] == ["1", "3", "4", "5", "6", "7", "8"]
    problems = [one.what for _, one in found if isinstance(one, Malformed)]
    for problem, part in zip(
        problems,
        ["'text' is a int", "no field 'text'; the row has 'body'", "is a list", "not JSON", "not UTF-8", "is null"],
        strict=True,
    ):
        assert part in problem


def test_text_that_is_not_utf8_names_its_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"good\n\nline\nb\xe9d\n")
    assert [where for where, _ in read(path)] == [f"{path}:1", f"{path}:4"]
    assert "0xe9" in read(path)[1][1].what


@pytest.mark.parametrize("cut", [1, 7, 40])
@pytest.mark.parametrize(("suffix", "pack"), [("gz", gzip.compress), ("zst", compressed_frames)])
def test_a_compressed_file_that_is_cut_off(tmp_path, suffix, pack, cut):
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(pack(jsonl(TEXTS * 20))[:-cut])
    with pytest.raises(DataError, match="cut off or damaged") as caught:
        read(path)
    assert caught.value.where == str(path)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_file_that_is_not_what_its_name_says(tmp_path, name):
    (tmp_path / name).write_bytes(b"plain text, and not a little of it")
    with pytest.raises(DataError, match="not readable as"):
        read(tmp_path / name)


def test_a_parquet_file_that_is_cut_off_or_lacks_the_column(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": TEXTS}), path)
    with pytest.raises(DataError, match="no column 'text'; the file has 'body'"):
        read(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="not readable as parquet"):
        read(path)


def test_directories_are_read_in_order_and_say_what_they_leave_out(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name in ("z.jsonl", "b/a.txt", "a.parquet", "model.bin", ".hidden/x.txt", "b/.y.txt"):
        (tmp_path / name).write_text("x")
    found, ignored = find_files([str(tmp_path)])
    assert [str(path.relative_to(tmp_path)) for path in found] == ["a.parquet", "b/a.txt", "z.jsonl"]
    assert [path.name for path in ignored] == ["model.bin"]


@pytest.mark.parametrize(
    ("given", "message"),
    [("absent.jsonl", "no such file"), ("x.pdf", "unknown type of corpus file '.pdf'"), ("empty", "no corpus file")],
)
def test_paths_that_are_no_corpus(tmp_path, given, message):
    (tmp_path / "x.pdf").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        find_files([str(Path(tmp_path, given))])


def test_a_file_given_twice(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match="given twice"):
        find_files([str(tmp_path), str(tmp_path / "a.txt")])
