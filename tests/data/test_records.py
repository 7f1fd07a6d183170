"""Rows out of files, with the place of each and of each error."""

from __future__ import annotations

import json

import pytest

from oarsmith.data.records import ReadLog, read_records
from oarsmith.data.sources import find_split, has_split
from oarsmith.errors import DataError

ROWS = [{"src": "a", "tgt": "b"}, {"src": "多\u2028字", "tgt": "🎉"}, {"src": "", "tgt": "x"}]


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_jsonl_rows_know_their_line_and_blank_lines_are_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", "\ufeff" + lines(ROWS[:1]) + "\n  \r\n" + lines(ROWS[1:]))
    log = ReadLog()
    records = list(read_records(path, log=log))
    assert [record.value for record in records] == ROWS
    assert [record.where for record in records] == [f"{path}:{n}" for n in (1, 4, 5)]
    assert log.blank == 2


@pytest.mark.parametrize(
    ("line", "part"),
    [
        (b'{"src": "cut', 'it begins with \'{"src": "cut\''),
        (b'{"src": "\xff"}', "not UTF-8 (byte 9: 0xff)"),
        (b"[1, 2]", "the row is a list"),
        (b"null", "the row is null"),
        (b'{"n": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_a_malformed_line_is_named_or_skipped(tmp_path, line, part):
    path = write(tmp_path / "a.jsonl", lines(ROWS[:1]).encode() + line + b"\n" + lines(ROWS[1:]).encode())
    with pytest.raises(DataError) as caught:
        list(read_records(path))
    assert caught.value.where == f"{path}:2" and part in caught.value.what and caught.value.fix
    log = ReadLog()
    assert len(list(read_records(path, log=log, on_malformed="skip"))) == 3
    assert [error.where for error in log.malformed] == [f"{path}:2"]


def test_json_lists_and_json_lines_in_a_json_file(tmp_path):
    listed = write(tmp_path / "list.json", " [\n" + ",\n\n".join(json.dumps(row, indent=1) for row in ROWS) + "\n]\n")
    records = list(read_records(listed))
    assert [record.value for record in records] == ROWS
    assert [record.where for record in records] == [f"{listed}:{n}" for n in (2, 7, 12)]
    by_line = write(tmp_path / "lines.json", lines(ROWS))
    assert [record.value for record in read_records(by_line)] == ROWS
    assert list(read_records(write(tmp_path / "none.json", "[]"))) == []


@pytest.mark.parametrize("content", ['[{"a": 1}', '[{"a": 1} {"a": 2}]', '[{"a": 1},\n{"a": ]', "[", '[{"a": 1},'])
def test_a_broken_json_list_is_an_error_with_its_line(tmp_path, content):
    path = write(tmp_path / "list.json", content)
    with pytest.raises(DataError) as caught:
        list(read_records(path, on_malformed="skip"))
    assert caught.value.where == f"{path}:{1 + content.count(chr(10))}"


def test_csv_keeps_line_breaks_and_long_cells_and_parses_structured_columns(tmp_path):
    long = "x" * 200_000
    path = write(tmp_path / "a.csv", f'src,tgt,context\n"two\nlines",{long},"{{""system"": ""s""}}"\n12,ok,\n')
    first, second = read_records(path)
    assert first.value == {"src": "two\nlines", "tgt": long, "context": {"system": "s"}}
    assert second.value == {"src": "12", "tgt": "ok"}
    assert (first.where, second.where) == (f"{path}:2", f"{path}:4")
    with pytest.raises(DataError, match="the row has 3 cells, the header 2"):
        list(read_records(write(tmp_path / "b.csv", "src,tgt\na,b,c\n")))


def test_parquet_and_saved_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(ROWS)
    data.to_parquet(tmp_path / "p" / "data" / "train-00000-of-00001.parquet")
    assert [record.value for record in read_records(tmp_path / "p")] == ROWS
    datasets.DatasetDict(train=data, validation=data.select([0])).save_to_disk(str(tmp_path / "saved"))
    assert [record.value for record in read_records(tmp_path / "saved")] == ROWS
    assert [record.value for record in read_records(tmp_path / "saved", "dev")] == ROWS[:1]
    with pytest.raises(DataError, match=r"no split 'test'; it has train, validation"):
        list(read_records(tmp_path / "saved", "test"))
    with pytest.raises(DataError, match="not readable as parquet"):
        list(read_records(write(tmp_path / "cut.parquet", b"PAR1nothing")))


def test_splits_of_a_folder(tmp_path):
    write(tmp_path / "flat" / "train.json", lines(ROWS))
    write(tmp_path / "flat" / "dev.json", lines(ROWS[:1]))
    assert find_split(tmp_path / "flat", "dev") == [tmp_path / "flat" / "dev.json"]
    assert len(list(read_records(tmp_path / "flat"))) == 3
    for name in ("b", "a"):
        write(tmp_path / "deep" / "train" / f"{name}.json", lines(ROWS))
    assert [path.name for path in find_split(tmp_path / "deep", "train")] == ["a.json", "b.json"]
    assert not has_split(tmp_path / "deep", "dev")
    with pytest.raises(DataError, match=r"no split 'dev'; it has train/"):
        find_split(tmp_path / "deep", "dev")


def test_a_missing_file_names_what_is_near(tmp_path):
    write(tmp_path / "alpaca.jsonl", "")
    with pytest.raises(DataError, match=r"did you mean 'alpaca.jsonl'\?"):
        list(read_records(tmp_path / "alpacca.jsonl"))
    with pytest.raises(DataError, match="the nearest that exists is"):
        list(read_records(tmp_path / "nowhere" / "deep" / "a.jsonl"))
    with pytest.raises(DataError, match=r"unknown data file type '.txt'"):
        list(read_records(write(tmp_path / "a.txt", "hello")))
