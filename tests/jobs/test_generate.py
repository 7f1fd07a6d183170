"""``oarsmith generate`` as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import oarsmith
from oarsmith import cli

pytestmark = pytest.mark.usefixtures("few_threads")


def test_a_file_of_prompts_becomes_a_file_of_answers(chain_model, tmp_path):
    """The real process: rows in, rows out in their order, numbers on stderr only."""
    model = chain_model("one two three STOP four")
    rows = [
        {"prompt": "count"},
        {"messages": [{"role": "user", "content": "count"}, {"role": "assistant", "content": "1"}]},
        {"src": "count, please " * 3},
    ]
    (tmp_path / "in.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    words = ["--input_file", "in.jsonl", "--output_file", "out/answers.jsonl", "--stop", " STOP", "--batch_size", "2"]
    process = subprocess.run(
        [sys.executable, "-m", "oarsmith", "generate", str(model), *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(oarsmith.__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert (process.returncode, process.stdout) == (0, ""), process.stderr
    assert "3 answers in out/answers.jsonl" in process.stderr
    answers = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert [answer["output"] for answer in answers] == ["one two three"] * 3
    assert [answer["prompt"] for answer in answers] == [
        "count",
        [{"role": "user", "content": "count"}],
        [{"role": "user", "content": "count, please " * 3}],
    ]
    assert [answer.get("reference") for answer in answers] == [None, "1", None]
    assert {answer["finish_reason"] for answer in answers} == {"stop"}
    assert answers[2]["num_prompt_tokens"] > answers[0]["num_prompt_tokens"] > 10
    assert os.listdir(tmp_path / "out") == ["answers.jsonl"]


@pytest.mark.parametrize("stream", ["true", "false"])
def test_one_prompt_prints_the_answer_alone_on_stdout(chain_model, capsys, stream):
    assert cli.main(["generate", str(chain_model("one 🦊 two")), "count", "--stream", stream]) == 0
    printed = capsys.readouterr()
    assert printed.out == "one 🦊 two\n"
    assert "tokens/s" in printed.err
    assert "the model ended it" in printed.err


def test_raw_text_goes_without_the_template(chain_model, capsys):
    model = str(chain_model("one two", after="count"))
    for words in (["--raw"], ["--chat_template", "none"]):
        assert cli.main(["generate", model, "count", *words, "--max_new_tokens", "2"]) == 0
        printed = capsys.readouterr()
        assert "one two".startswith(printed.out.strip())
        assert "cut at the limit" in printed.err


def test_the_same_seed_gives_the_same_answer(chain_model, capsys):
    model, said = str(chain_model("one two")), []
    # So hot that the script no longer decides.
    for seed in ("1", "1", "2"):
        words = ["--temperature", "100", "--max_new_tokens", "12", "--seed", seed]
        assert cli.main(["generate", model, "count", *words]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]


@pytest.mark.parametrize(
    ("rows", "words", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": "' + "word " * 400 + '"}\n', [], "in.jsonl:2"),
        ('{"prompt": "a"}\n', ["--output_file", "."], "is a directory"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', ["--raw"], "cannot be continued raw"),
        ("", [], "the file has no rows"),
    ],
)
def test_what_cannot_be_answered_leaves_no_file(chain_model, tmp_path, monkeypatch, capsys, rows, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text(rows)
    given = ["--input_file", "in.jsonl", *(words if "--output_file" in words else ["--output_file", "o.jsonl", *words])]
    assert cli.main(["generate", str(chain_model("one")), *given]) == cli.EXIT_BAD_INPUT
    assert message in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["in.jsonl"]


def test_a_model_without_a_template_says_what_to_do(chain_model, capsys):
    model = chain_model("one two")
    config = json.loads((model / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    assert cli.main(["generate", str(model), "count"]) == cli.EXIT_BAD_INPUT
    assert "--raw" in capsys.readouterr().err
    assert cli.main(["generate", str(model), "count", "--chat_template", "chatml"]) == 0
    assert capsys.readouterr().out == "one two\n"
