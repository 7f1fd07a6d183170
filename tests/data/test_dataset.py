"""A whole source: the report adds up, and data that cannot train is refused."""

from __future__ import annotations

import json

import pytest

from oarsmith.data.dataset import build_samples
from oarsmith.data.samples import SampleOptions
from oarsmith.errors import DataError


def write(path, rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


GOOD = [{"src": f"question {n}", "tgt": f"answer {n}"} for n in range(20)]


def test_the_report_counts_every_row(tmp_path, tokenizer):
    rows = [*GOOD, "", {"src": "q", "tgt": ""}, {"src": "q", "tgt": "long " * 200}]
    path = write(tmp_path / "rows.jsonl", rows)
    calls = []
    built = build_samples(path, tokenizer, SampleOptions(max_length=160), lambda *call: calls.append(call))
    report = built.report
    assert (report.rows, report.blank, report.kept, report.num_left_out) == (22, 1, 21, 1)
    assert report.num_samples == len(built) == 21
    assert report.num_tokens == sum(map(len, built.samples))
    assert report.num_trained == sum(sample.num_trained for sample in built.samples)
    (reason,) = report.dropped.values()
    assert reason.count == 1 and reason.examples[0].startswith(f"{path}:22")
    assert report.notes == {"answer cut at its end": 1}
    assert report.lengths[100] == 160 and 0.5 < report.packing <= 1
    assert calls[-1] == (22, 22, "encoding rows")
    assert json.loads(json.dumps(report.to_dict()))["trained_tokens"] == report.num_trained
    text = "\n".join(report.lines())
    assert "22 rows read, 21 kept, 1 left out, 1 blank lines" in text and "no answer to train on" in text
    assert built.samples[0].where == f"{path}:1"


def test_the_fingerprint_is_of_ids_and_weights(tmp_path, tokenizer):
    first = build_samples(write(tmp_path / "a.jsonl", GOOD), tokenizer, SampleOptions())
    again = build_samples(write(tmp_path / "b.jsonl", GOOD), tokenizer, SampleOptions())
    other = build_samples(tmp_path / "a.jsonl", tokenizer, SampleOptions(train_on="all"))
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_malformed_rows_stop_or_are_counted(tmp_path, tokenizer):
    path = write(tmp_path / "rows.jsonl", [*GOOD[:5], '{"src": ', *GOOD[5:10], {"src": 3, "tgt": "a"}, *GOOD[10:]])
    with pytest.raises(DataError) as caught:
        build_samples(path, tokenizer, SampleOptions())
    assert caught.value.where == f"{path}:6"
    report = build_samples(path, tokenizer, SampleOptions(on_malformed="skip")).report
    assert (report.rows, report.kept, report.malformed.count, report.num_left_out) == (22, 20, 2, 2)
    assert any(f"{path}:6" in example for example in report.malformed.examples)


def test_too_many_rows_left_out_or_none_trained_is_an_error(tmp_path, tokenizer, template_tokenizer):
    empty = [{"src": "q", "tgt": ""}] * 10
    path = write(tmp_path / "rows.jsonl", [*GOOD, *empty])
    with pytest.raises(DataError, match=r"10 of 30 rows \(33%\) were left out, the limit is 20%. 10 x no answer"):
        build_samples(path, tokenizer, SampleOptions())
    assert len(build_samples(path, tokenizer, SampleOptions(max_dropped_fraction=0.5))) == 20
    with pytest.raises(DataError) as caught:
        build_samples(path, tokenizer, SampleOptions(on_empty="error"))
    assert caught.value.where == f"{path}:21" and "no trained token" in caught.value.what
    with pytest.raises(DataError, match="no token would be trained: 10 rows read, 0 kept"):
        build_samples(write(tmp_path / "e.jsonl", empty), tokenizer, SampleOptions(max_dropped_fraction=1))
    with pytest.raises(DataError, match="no rows in the data"):
        build_samples(write(tmp_path / "n.jsonl", [""]), tokenizer, SampleOptions())
    system = [{**row, "context": {"system": "s"}} for row in GOOD]
    with pytest.raises(DataError, match="System role not supported"):
        build_samples(write(tmp_path / "s.jsonl", system), template_tokenizer("gemma"), SampleOptions())
