"""Rows of every format as prompts: what is asked, and the answer that must not be shown to the model."""

import json

import pytest

from oarsmith.errors import DataError
from oarsmith.jobs.prompt_rows import read_rows


def read(folder, *rows, name="rows.jsonl"):
    path = folder / name
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return [found.prompt() for found in read_rows(str(path))]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("row", "prompt", "reference"),
    [
        ({"prompt": "a"}, "a", None),
        ({"text": "a"}, "a", None),
        ({"src": "a"}, [user("a")], None),
        ({"src": "a", "tgt": "b"}, [user("a")], "b"),
        ({"src": ["a", "c"], "tgt": ["b"]}, [user("a"), assistant("b"), user("c")], None),
        ({"src": ["a", "c"], "tgt": ["b", "d"]}, [user("a"), assistant("b"), user("c")], "d"),
        ({"src": ["a"]}, [user("a")], None),
        ({"instruction": "a", "input": "b"}, [user("a\nb")], None),
        ({"instruction": "a", "output": "b"}, [user("a")], "b"),
        ({"messages": [user("a")]}, [user("a")], None),
        ({"messages": [user("a"), assistant("b")]}, [user("a")], "b"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, [user("a")], "b"),
    ],
)
def test_a_row_of_each_format(tmp_path, row, prompt, reference):
    (found,) = read(tmp_path, row)
    assert (found.prompt, found.reference) == (prompt, reference)
    assert found.where.endswith("rows.jsonl:1")


def test_lines_of_a_text_file(tmp_path):
    found = read(tmp_path, "first\r", "", "  ", "second \u2028 line", name="rows.txt")
    assert [row.prompt for row in found] == ["first", "second \u2028 line"]
    assert [row.where.rpartition(":")[2] for row in found] == ["1", "4"]


def test_the_system_message_of_the_row_wins(tmp_path):
    own = [{"role": "system", "content": "own"}, user("a")]
    with_own, without = read(tmp_path, {"messages": own}, {"prompt": "a"})
    assert with_own.messages("given") == own
    assert without.messages("given") == [{"role": "system", "content": "given"}, user("a")]
    assert without.messages(None) == [user("a")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": 3}, "field 'prompt' is the number 3"),
        ({"messages": [{"role": "system", "content": "s"}]}, "the row asks nothing"),
        ({"messages": [assistant("b")]}, "the row asks nothing"),
        ({"src": ["a", "b", "c"], "tgt": ["d"]}, "'src' has 3 turns and 'tgt' 1"),
        ({"question": "a"}, "fit no known format"),
        ("{", "not JSON"),
    ],
)
def test_a_row_that_cannot_be_asked_is_named(tmp_path, row, message):
    with pytest.raises(DataError, match=r"rows\.jsonl:2") as caught:
        read(tmp_path, {"prompt": "fine"}, row)
    assert message in caught.value.what


def test_files_without_rows(tmp_path):
    assert read(tmp_path) == []
    with pytest.raises(DataError):
        list(read_rows(str(tmp_path / "missing.txt")))


def test_sampling_keys_of_a_row_and_of_a_cell(tmp_path):
    (found,) = read(tmp_path, {"src": "a", "sampling": {"top_k": 3, "seed": None}})
    assert found.sampling == {"top_k": 3}
    (tmp_path / "rows.csv").write_text('prompt,sampling\na,"{""top_k"": 3}"\nb,\n')
    assert [row.prompt().sampling for row in read_rows(str(tmp_path / "rows.csv"))] == [{"top_k": 3}, {}]


def test_a_line_that_is_no_text_is_one_rows_error(tmp_path):
    (tmp_path / "rows.txt").write_bytes(b"\xef\xbb\xbfone\n\xff\ntwo\n")
    first, broken, last = read_rows(str(tmp_path / "rows.txt"))
    assert (first.prompt().prompt, last.prompt().prompt) == ("one", "two")
    with pytest.raises(DataError, match=r"rows\.txt:2: the line is not UTF-8"):
        broken.prompt()
