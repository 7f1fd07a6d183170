"""``oarsmith preprocess`` as a user runs it: the command, its report, its errors, kill -9, a local Ray cluster."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

import oarsmith
from oarsmith import cli, demo
from oarsmith.data.corpus.indexed import IndexedDataset
from oarsmith.data.corpus.workfolder import work_path
from tiny import TOKENIZER, command, environment

TEXTS = [part for part in demo.unrelated_text().split("\n\n") if len(part) > 20]


@pytest.fixture
def corpus(tmp_path):
    """Three files of different kinds with the same documents as TEXTS, in order."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    a, b = len(TEXTS) // 3, 2 * len(TEXTS) // 3
    (folder / "1.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:a]))
    (folder / "2.txt").write_text("\n\n".join(TEXTS[a:b]))
    (folder / "3.json").write_text(json.dumps([{"text": text} for text in TEXTS[b:]]))
    (folder / "README.rst").write_text("not a part of it")
    return folder


def run(*words, **keys):
    return cli.main(["preprocess", *map(str, words), *(f"--{key}={value}" for key, value in keys.items())])


def documents_of(prefix):
    dataset = IndexedDataset(Path(prefix))
    return [dataset.read(index).tolist() for index in range(len(dataset))]


def expected(texts=TEXTS, path=TOKENIZER):
    tokenizer = oarsmith.load_tokenizer(path)
    return [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]


def test_the_command_and_its_report(corpus, tmp_path, capsys):
    assert run(corpus, tmp_path / "out" / "train", tokenizer_name_or_path=TOKENIZER, workers=2) == 0
    assert documents_of(tmp_path / "out" / "train") == expected()
    report = json.loads((tmp_path / "out" / "train.report.json").read_text())
    assert report["kept"] == report["documents"] == len(TEXTS)
    assert report["tokens"] == sum(map(len, expected())) and report["dtype"] == "uint16"
    assert report["encoded_with"] == "tiktoken" and report["config"]["workers"] == 2
    assert report["ignored_files"]["examples"] == [str(corpus / "README.rst")]
    printed = capsys.readouterr().out
    for part in (f"{len(TEXTS)} documents read from 3 files", "bytes of text a token", "ignored: 1 files", "MB/s"):
        assert part in printed
    assert sorted(os.listdir(tmp_path / "out")) == ["train.bin", "train.idx", "train.report.json"]


def test_keys_of_paddlenlps_tool(corpus, tmp_path):
    words = ["--model_name_or_path", TOKENIZER, "--input_path", corpus, "--output_prefix", tmp_path / "out"]
    words += ["--json_key", "text", "--append_eos", "--workers", "1", "--data_impl", "mmap", "--log_interval", "5"]
    words += ["--max_doc_num", "3", "--max_repeated_len", "100", "--min_doc_length", "10", "--doc_spliter", ""]
    assert run(*words) == 0
    assert documents_of(tmp_path / "out") == expected(TEXTS[:3])


def test_without_eos(corpus, tmp_path):
    assert run(corpus, tmp_path / "out", tokenizer_name_or_path=TOKENIZER, append_eos="false", workers=1) == 0
    assert documents_of(tmp_path / "out") == [ids[:-1] for ids in expected()]


def test_a_tokenizer_is_trained_and_used(corpus, tmp_path, capsys):
    keys = {"train_tokenizer": tmp_path / "tok", "vocab_size": 400, "bos_token": "<s>", "workers": 1}
    assert run(corpus, tmp_path / "out", **keys) == 0
    assert documents_of(tmp_path / "out") == expected(path=tmp_path / "tok")
    assert run(corpus, tmp_path / "again", **keys) == 0
    assert "it is used" in capsys.readouterr().out
    assert run(corpus, **keys) == 0
    assert run(corpus, **{**keys, "vocab_size": 500}) == cli.EXIT_BAD_INPUT
    assert "exists already, and is not what this would train" in capsys.readouterr().err


def test_reports_of_its_own_are_not_read(corpus, tmp_path):
    for name in ("one", "two"):
        assert run(corpus, corpus / "made" / name, tokenizer_name_or_path=TOKENIZER, workers=1) == 0
    one, two = (documents_of(corpus / "made" / name) for name in ("one", "two"))
    assert one == two


def test_merge(corpus, tmp_path):
    keys = {"tokenizer_name_or_path": TOKENIZER, "workers": 1}
    for name in ("1.jsonl", "2.txt", "3.json"):
        # By name: a first word that ends in .json is a configuration.
        assert run(**keys, input_path=corpus / name, output_prefix=tmp_path / "parts" / name) == 0
    assert run(tmp_path / "parts", tmp_path / "all", "--merge") == 0
    assert documents_of(tmp_path / "all") == expected()
    several = [f"--input_path={tmp_path / 'parts' / name}" for name in ("3.json", "1.jsonl")]
    assert run("--merge", *several, output_prefix=tmp_path / "two") == 0
    assert len(documents_of(tmp_path / "two")) == len(TEXTS) - len(documents_of(tmp_path / "parts" / "2.txt"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "no tokenizer is named"),
        ({"tokenizer_name_or_path": TOKENIZER, "train_tokenizer": "x"}, "another one is to be trained"),
        ({"tokenizer_name_or_path": TOKENIZER, "minhash_threshold": 0.5}, "dedup is none"),
        ({"tokenizer_name_or_path": TOKENIZER, "vocab_size": 1000}, "none is trained"),
        ({"tokenizer_name_or_path": TOKENIZER, "ray_address": "auto"}, "engine is local"),
        ({"tokenizer_name_or_path": TOKENIZER, "data_impl": "lazy"}, "another layout than mmap"),
        ({"tokenizer_name_or_path": TOKENIZER, "json_key": "content"}, "no field 'content'; the row has 'text'"),
        ({"tokenizer_name_or_path": TOKENIZER, "min_doc_length": 10**9}, "no document is kept"),
        ({"tokenizer_name_or_path": "absent"}, "there is no directory 'absent'"),
        ({"merge": True, "dedup": "exact"}, "merge copies documents as they are"),
    ],
)
def test_what_cannot_be_done(corpus, tmp_path, capsys, keys, message):
    assert run(corpus, tmp_path / "out", **{"workers": 1, **keys}) == cli.EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert message in error and "fix:" in error and "Traceback" not in error
    assert not (tmp_path / "out.bin").exists() and not (tmp_path / "out.idx").exists()


def test_a_tokenizer_without_eos(corpus, tmp_path, capsys):
    folder = tmp_path / "tok"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes((TOKENIZER / "tokenizer.json").read_bytes())
    assert run(corpus, tmp_path / "out", tokenizer_name_or_path=folder, workers=1) == cli.EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert "has no eos_token" in error and "--append_eos false" in error
    assert run(corpus, tmp_path / "out", tokenizer_name_or_path=folder, workers=1, append_eos="false") == 0


def test_outputs_are_not_replaced_by_accident(corpus, tmp_path, capsys):
    keys = {"tokenizer_name_or_path": TOKENIZER, "workers": 1}
    assert run(corpus, tmp_path / "out", **keys) == 0
    assert run(corpus / "1.jsonl", tmp_path / "out", **keys) == cli.EXIT_BAD_INPUT
    assert "exists already" in capsys.readouterr().err
    assert documents_of(tmp_path / "out") == expected()
    assert run(corpus / "1.jsonl", tmp_path / "out", "--overwrite", **keys) == 0
    assert len(documents_of(tmp_path / "out")) == len(TEXTS) // 3
    assert run(corpus, tmp_path, **keys) == cli.EXIT_BAD_INPUT
    assert "is a directory" in capsys.readouterr().err


def alive_in(group):
    """Processes of a process group that are no zombies."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def wait_until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.mark.slow
def test_killed_and_started_again(tmp_path):
    """kill -9 in the middle: the workers end too, nothing is there, and the next start gives the same bytes."""
    rows = [json.dumps({"text": f"{n} {text}"}) + "\n" for n in range(1500) for text in TEXTS]
    (tmp_path / "a.jsonl").write_text("".join(rows))
    keys = ["--tokenizer_name_or_path", str(TOKENIZER), "--dedup", "exact"]

    def words(name, workers):
        return command(["preprocess", str(tmp_path / "a.jsonl"), str(tmp_path / name), *keys, f"--workers={workers}"])

    process = subprocess.Popen(words("out", 2), env=environment(), start_new_session=True, stdout=subprocess.DEVNULL)
    folder = work_path(tmp_path / "out")
    wait_until(lambda: len(list(folder.glob("shard-*.json"))) >= 2 or process.poll() is not None, 60)
    assert process.poll() is None, "it was done before it could be killed: give it more to do"
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_until(lambda: not alive_in(process.pid), 20)
    assert not list(tmp_path.glob("out.*"))
    finished = {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*.json")}
    again = subprocess.run(words("out", 2), env=environment(), capture_output=True, text=True, check=True)
    assert finished and "going on with the shards that are finished" in again.stdout
    subprocess.run(words("whole", 1), env=environment(), capture_output=True, check=True)
    for ending in (".bin", ".idx"):
        assert (tmp_path / f"out{ending}").read_bytes() == (tmp_path / f"whole{ending}").read_bytes()
    reports = [json.loads((tmp_path / f"{name}.report.json").read_text()) for name in ("out", "whole")]
    for key in ("documents", "kept", "left_out", "tokens", "longest", "bytes_per_token"):
        assert reports[0][key] == reports[1][key]
    assert not folder.exists()


@pytest.mark.slow
def test_ray_gives_the_same(corpus, tmp_path):
    pytest.importorskip("ray", reason="pip install 'oarsmith[ray]'")
    keys = ["--tokenizer_name_or_path", str(TOKENIZER), "--dedup", "minhash"]
    for name, more in (("ray", ["--engine", "ray", "--workers", "2"]), ("local", ["--workers", "1"])):
        words = command(["preprocess", str(corpus), str(tmp_path / name), *keys, *more])
        done = subprocess.run(words, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    for ending in (".bin", ".idx"):
        assert (tmp_path / f"ray{ending}").read_bytes() == (tmp_path / f"local{ending}").read_bytes()


def test_the_type_follows_the_vocabulary(corpus, tmp_path):
    """A vocabulary of 65,535 ids and more needs int32."""
    folder = tmp_path / "tok"
    folder.mkdir()
    content = json.loads((TOKENIZER / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    content["added_tokens"] = []
    vocabulary |= {f"unused{index}": index for index in range(max(vocabulary.values()) + 1, 65535)}
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert run(corpus, tmp_path / "out", tokenizer_name_or_path=folder, workers=1, append_eos="false") == 0
    assert IndexedDataset(tmp_path / "out").dtype == np.int32
    assert documents_of(tmp_path / "out") == [ids[:-1] for ids in expected()]
