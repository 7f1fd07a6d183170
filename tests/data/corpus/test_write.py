"""The pipeline: its output is that of one pass over all documents, whatever the pieces, the workers and the kills."""

import json
import struct
from dataclasses import replace

import numpy as np
import pytest

import oarsmith
from oarsmith.data.corpus.clean import Cleaning
from oarsmith.data.corpus.dedup import Dedup
from oarsmith.data.corpus.engines import local_engine
from oarsmith.data.corpus.files import Layout
from oarsmith.data.corpus.shard import Settings, counts_path
from oarsmith.data.corpus.tokenize import Encoding
from oarsmith.data.corpus.workfolder import is_interrupted, work_folder, work_path
from oarsmith.data.corpus.write import open_corpus, plan_of, write_corpus
from oarsmith.errors import DataError, OarsmithError
from tiny import TOKENIZER

TEXTS = [f"Document {n}: " + "some words of it, " * (n % 11) + ("中文" * (n % 3)) for n in range(120)]
EOS = 5
SETTINGS = Settings(
    layout=Layout(),
    cleaning=Cleaning(min_length=1),
    encoding=Encoding(tokenizer=str(TOKENIZER), dtype="<u2", eos=EOS, add_special_tokens=True, fast=None),
    dedup=Dedup(),
    skip_malformed=False,
)


@pytest.fixture(scope="module")
def tokenizer():
    return oarsmith.load_tokenizer(TOKENIZER)


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def write(paths, prefix, settings=SETTINGS, *, size=500, engine=None, **options):
    """The account of writing a corpus in pieces of `size` bytes."""
    corpus = open_corpus([str(path) for path in paths], settings.layout, size)
    with work_folder(prefix, plan_of(corpus, settings, "tokenizer")) as work:
        return write_corpus(corpus, prefix, settings, engine or local_engine(1), work, **options)


def read_pair(prefix):
    """A pair read by the documented byte layout alone: dtype code, documents as lists of ids."""
    data = prefix.with_name(prefix.name + ".idx").read_bytes()
    magic, version, code, num, num_borders = struct.unpack_from("<9sQBQQ", data)
    assert (magic, version) == (b"MMIDIDX\x00\x00", 1)
    at = struct.calcsize("<9sQBQQ")
    sizes = struct.unpack_from(f"<{num}i", data, at)
    offsets = struct.unpack_from(f"<{num}q", data, at + 4 * num)
    borders = struct.unpack_from(f"<{num_borders}q", data, at + 12 * num)
    assert len(data) == at + 12 * num + 8 * num_borders
    assert borders == tuple(range(num + 1)), "a sequence a document"
    tokens = prefix.with_name(prefix.name + ".bin").read_bytes()
    kind, width = {8: ("H", 2), 4: ("i", 4)}[code]
    ends = [offset + width * size for offset, size in zip(offsets, sizes, strict=True)]
    assert list(offsets) == [0, *ends[:-1]] and ends[-1] == len(tokens)
    return code, [list(struct.unpack_from(f"<{n}{kind}", tokens, at)) for n, at in zip(sizes, offsets, strict=True)]


def bytes_of(prefix):
    return tuple(prefix.with_name(prefix.name + ending).read_bytes() for ending in (".bin", ".idx"))


@pytest.mark.parametrize(("dtype", "code"), [("<u2", 8), ("<i4", 4)])
def test_output_is_the_documented_layout(tmp_path, tokenizer, dtype, code):
    settings = replace(SETTINGS, encoding=replace(SETTINGS.encoding, dtype=dtype))
    report = write([write_jsonl(tmp_path / "a.jsonl", TEXTS)], tmp_path / "out", settings)
    expected = [[*tokenizer.encode(text), EOS] for text in TEXTS]
    assert read_pair(tmp_path / "out") == (code, expected)
    assert (report.documents, report.kept) == (len(TEXTS), len(TEXTS))
    assert report.tokens == sum(map(len, expected))
    assert report.text_bytes == sum(len(text.encode()) for text in TEXTS)
    longest = max(range(len(TEXTS)), key=lambda n: len(expected[n]))
    assert report.longest == (len(expected[longest]), f"{tmp_path / 'a.jsonl'}:{longest + 1}")
    assert not work_path(tmp_path / "out").exists()


def test_pieces_and_workers_do_not_matter(tmp_path):
    paths = [write_jsonl(tmp_path / f"{n}.jsonl", TEXTS[30 * n : 30 * n + 30]) for n in range(4)]
    settings = replace(SETTINGS, dedup=Dedup("exact"))
    for name, size, workers in (("a", 1 << 20, 1), ("b", 100, 1), ("c", 3000, 3)):
        write(paths, tmp_path / name, settings, size=size, engine=local_engine(workers))
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b") == bytes_of(tmp_path / "c")


class KilledError(RuntimeError):
    """Stands for the end of the process."""


def stops_after(number):
    def engine(shards, settings, folder):
        for count, done in enumerate(local_engine(1)(shards, settings, folder)):
            yield done
            if count + 1 == number:
                raise KilledError

    return engine


def test_a_stopped_job_goes_on(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    whole = write([path], tmp_path / "whole")
    made = []

    def counting(shards, settings, folder):
        for done in local_engine(1)(shards, settings, folder):
            made.append(done[0].number)
            yield done

    with pytest.raises(KilledError):
        write([path], tmp_path / "out", engine=stops_after(4))
    assert not (tmp_path / "out.idx").exists() and not (tmp_path / "out.bin").exists()
    report = write([path], tmp_path / "out", engine=counting)
    assert min(made) == 4, "the finished shards are kept"
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")
    ignored = {"seconds", "mb_per_second"}
    a, b = ({k: v for k, v in one.to_dict().items() if k not in ignored} for one in (report, whole))
    assert a == b


def test_shards_of_other_settings_or_files_are_removed(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    with pytest.raises(KilledError):
        write([path], tmp_path / "out", engine=stops_after(4))
    for settings, reason in (
        (replace(SETTINGS, cleaning=Cleaning(min_length=40)), "min_doc_length 1"),
        (SETTINGS, "min_doc_length 40"),
    ):
        corpus = open_corpus([str(path)], settings.layout, 500)
        plan = plan_of(corpus, settings, "tokenizer")
        assert not is_interrupted(tmp_path / "out", plan)
        with pytest.raises(KilledError), work_folder(tmp_path / "out", plan) as work:
            assert reason in work.note and not work.continues
            assert not list(work.path.glob("shard-*"))
            raise KilledError
    path.write_text(path.read_text() + '{"text": "one more"}\n')
    corpus = open_corpus([str(path)], SETTINGS.layout, 500)
    with work_folder(tmp_path / "out", plan_of(corpus, SETTINGS, "tokenizer")) as work:
        assert "another files" in work.note


def test_two_processes_for_one_output(tmp_path):
    second = work_folder(tmp_path / "out", {})
    with work_folder(tmp_path / "out", {}), pytest.raises(OarsmithError, match="another process"), second:
        pass


@pytest.mark.parametrize(("wanted", "workers"), [(1, 1), (7, 1), (40, 1), (96, 1), (120, 1), (500, 1), (7, 2), (95, 2)])
def test_max_documents(tmp_path, tokenizer, wanted, workers):
    texts = [text if n % 5 else "" for n, text in enumerate(TEXTS)]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    report = write([path], tmp_path / "out", engine=local_engine(workers), max_documents=wanted)
    expected = [[*tokenizer.encode(text), EOS] for text in texts if text][:wanted]
    assert read_pair(tmp_path / "out")[1] == expected
    assert report.kept == len(expected)
    if wanted < 96:
        assert report.documents == next(n for n in range(1, 121) if sum(map(bool, texts[:n])) == wanted)


@pytest.mark.parametrize("size", [100, 1 << 20])
@pytest.mark.parametrize("kind", ["exact", "minhash"])
def test_duplicates_go_across_shards_and_files(tmp_path, tokenizer, kind, size):
    texts = [f"number {n} " + " ".join(f"word{n * 100 + i}" for i in range(40)) for n in range(40)]
    first, second = texts[:25], [*texts[20:30], texts[0].upper(), *texts[30:], texts[35]]
    paths = [write_jsonl(tmp_path / "a.jsonl", first), write_jsonl(tmp_path / "b.jsonl", second)]
    report = write(paths, tmp_path / "out", replace(SETTINGS, dedup=Dedup(kind)), size=size)
    assert read_pair(tmp_path / "out")[1] == [[*tokenizer.encode(text), EOS] for text in texts]
    (reason,) = report.left_out.values()
    assert reason.count == 7 and reason.examples == [f"{tmp_path / 'b.jsonl'}:{n}" for n in (1, 2, 3)]
    assert (report.documents, report.kept) == (47, 40)
    assert report.tokens == sum(len(tokenizer.encode(text)) + 1 for text in texts)


@pytest.mark.parametrize("size", [30, 1 << 20])
def test_what_is_left_out_is_counted_with_places(tmp_path, size):
    path = tmp_path / "a.jsonl"
    rows = [
        '{"text": "long enough"}',
        "",
        '{"text": "short"}',
        '{"text": 1}',
        '{"text": "\\ud800 is half"}',
        "{",
        '{"text": "' + "-" * 300 + ' and more"}',
    ]
    path.write_text("\n".join(rows), encoding="utf-8")
    settings = replace(SETTINGS, cleaning=Cleaning(min_length=8), skip_malformed=True)
    report = write([path], tmp_path / "out", settings, size=size)
    assert (report.documents, report.kept, report.blank, report.collapsed) == (6, 2, 1, 1)
    assert report.left_out["too short"].examples == [f"{path}:3 (5 characters)"]
    assert [example.split(" ")[0] for example in report.left_out["malformed"].examples] == [
        f"{path}:{n}" for n in (4, 5, 6)
    ]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_malformed_row_stops_the_job_with_its_line(tmp_path, workers):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    path.write_text(path.read_text() + '{"no": "text"}\n')
    with pytest.raises(DataError, match="no field 'text'") as caught:
        write([path], tmp_path / "out", engine=local_engine(workers))
    assert caught.value.where == f"{path}:121" and "--json_key" in caught.value.fix


def test_nothing_kept_and_nothing_there(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["a", "b"])
    with pytest.raises(DataError, match=r"no document is kept: 2 read\. 2 x too short, such as .*a.jsonl:1"):
        write([path], tmp_path / "out", replace(SETTINGS, cleaning=Cleaning()))
    path.write_text("")
    with pytest.raises(DataError, match="the corpus is empty"):
        open_corpus([str(path)], Layout())
    path.write_text("\n\n")
    with pytest.raises(DataError, match=r"no document is kept: 0 read\. 2 blank lines"):
        write([path], tmp_path / "out")


def test_a_shard_without_documents_is_no_gap(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", [TEXTS[1], *[""] * 60, TEXTS[2]])
    write([path], tmp_path / "out", size=60)
    assert read_pair(tmp_path / "out")[1] == [[*tokenizer.encode(text), EOS] for text in TEXTS[1:3]]


def test_eos_is_not_doubled(tmp_path, tokenizer):
    text = "a text that ends itself" + tokenizer.id_to_token(tokenizer.eos_id)
    settings = replace(SETTINGS, encoding=replace(SETTINGS.encoding, eos=tokenizer.eos_id))
    write([write_jsonl(tmp_path / "a.jsonl", [text])], tmp_path / "out", settings)
    assert read_pair(tmp_path / "out")[1] == [tokenizer.encode(text)]


def test_ids_too_large_for_the_type_are_refused(tmp_path):
    settings = replace(SETTINGS, encoding=replace(SETTINGS.encoding, eos=70_000))
    with pytest.raises(DataError, match="70000 does not fit into uint16"):
        write([write_jsonl(tmp_path / "a.jsonl", TEXTS)], tmp_path / "out", settings)


def test_finished_shards_say_so_last(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    with pytest.raises(KilledError):
        write([path], tmp_path / "out", engine=stops_after(1))
    folder = work_path(tmp_path / "out")
    counts = counts_path(folder / "shard-000000")
    assert counts.stat().st_mtime_ns >= (folder / "shard-000000.idx").stat().st_mtime_ns
    assert np.fromfile(folder / "shard-000000.bin", "<u2").size == json.loads(counts.read_text())["tokens"]
