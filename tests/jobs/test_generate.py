"""``oarsmith generate`` as a user runs it."""

import json
import os
import re
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


def generated(tmp_path, model, rows, *words):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert (
        cli.main(["generate", str(model), "--input_file", str(source), "--output_file", str(target), *map(str, words)])
        == 0
    )
    return [json.loads(line) for line in target.read_text().splitlines()]


def test_several_answers_and_their_logprobs(chain_model, tmp_path):
    words = ["--n", 2, "--best_of", 3, "--logprobs", 2, "--prompt_logprobs", 0, "--temperature", 100]
    (answer,) = generated(tmp_path, chain_model("one two"), [{"prompt": "count"}], *words, "--max_new_tokens", 5)
    (other,) = answer["others"]
    assert answer["output"] != other["output"]
    for one in (answer, other):
        assert len(one["logprobs"]) == one["num_tokens"] <= 5
        assert all(len(entry["top"]) == 2 and entry["logprob"] <= entry["top"][0][1] for entry in one["logprobs"])
    mean = [sum(entry["logprob"] for entry in one["logprobs"]) / one["num_tokens"] for one in (answer, other)]
    assert mean[0] >= mean[1]
    assert len(answer["prompt_logprobs"]) == answer["num_prompt_tokens"] - 1


def test_several_answers_in_the_terminal(chain_model, capsys):
    assert cli.main(["generate", str(chain_model("one two")), "count", "--n", "2", "--temperature", "0.01"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "one two\none two\n"
    assert "answer 2 of 2:" in printed.err


def test_constraints_from_words_and_files(chain_model, tmp_path, capsys):
    pytest.importorskip("llguidance", reason="pip install 'oarsmith[constrained]'")
    model, schema = str(chain_model("one two")), {"type": "object", "properties": {"a": {"enum": [1, 2]}}}
    schema |= {"required": ["a"], "additionalProperties": False}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    (tmp_path / "two.lark").write_text('start: "x" | "y"\n')
    for words, matches in [
        (["--json_schema", str(tmp_path / "schema.json")], lambda text: json.loads(text)["a"] in (1, 2)),
        (["--json_schema", json.dumps(schema)], lambda text: json.loads(text)["a"] in (1, 2)),
        (["--grammar", str(tmp_path / "two.lark")], lambda text: text in ("x", "y")),
        (["--grammar", 'start: "z"'], lambda text: text == "z"),
        (["--regex", "[0-9]{4}"], lambda text: len(text) == 4 and text.isdigit()),
        (["--choices", '["ja", "nein"]', "--temperature", "3"], lambda text: text in ("ja", "nein")),
    ]:
        assert cli.main(["generate", model, "count", "--max_new_tokens", "100", *words]) == 0
        assert matches(capsys.readouterr().out.removesuffix("\n")), words


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--json_schema", "none.json"], "the file none.json cannot be read: No such file"),
        (["--grammar", "none.lark"], "the file none.lark cannot be read: No such file"),
        (["--json_schema", "{"], "json_schema must be a JSON schema"),
        (["--logit_bias", "{"], "must be a JSON object"),
        (["--logit_bias", '{"3": 101}'], "logit_bias has 101.0 for token 3"),
        (["--logit_bias", '{"999999": 1}'], "logit_bias has token 999999; the vocabulary has"),
    ],
)
def test_a_setting_that_cannot_be_is_explained(chain_model, capsys, words, message):
    assert cli.main(["generate", str(chain_model("one two")), "count", *words]) != 0
    assert message in " ".join(capsys.readouterr().err.split())


def test_bias_bad_words_and_least_length_reach_the_engine(chain_model, capsys):
    model = str(chain_model("one two"))
    assert cli.main(["generate", model, "count", "--bad_words", "one", "--max_new_tokens", "8"]) == 0
    assert "one" not in capsys.readouterr().out
    assert cli.main(["generate", model, "count", "--min_new_tokens", "12", "--max_new_tokens", "12"]) == 0
    assert "12 new" in capsys.readouterr().err


def test_guesses_are_counted_and_change_nothing(chain_model, capsys):
    text = "one two three STOP four"
    model = str(chain_model(text))
    for speculative, most in (("ngram", 20), (model, 100)):
        words = ["--speculative", speculative, "--num_draft_tokens", "2", "--ngram_max", "4"]
        assert cli.main(["generate", model, f"Say: {text}", *words]) == 0
        printed = capsys.readouterr()
        assert printed.out == f"{text}\n"
        right, guessed = map(int, re.search(r"(\d+) of (\d+) guesses right", printed.err).groups())
        assert 0 < right <= guessed <= most
    assert cli.main(["generate", model, "count", "--speculative", "ngram", "--ngram_min", "4"]) != 0
    assert "ngram_min 4 is more than ngram_max 3" in capsys.readouterr().err


def test_a_beam_search_from_words_and_rows(chain_model, tmp_path, capsys):
    model = str(chain_model("one two three"))
    assert cli.main(["generate", model, "count", "--num_beams", "9", "--early_stopping", "true"]) == 0
    assert capsys.readouterr().out == "one two three\n"
    rows = [
        {"prompt": "count", "sampling": {"num_beams": 3, "n": 2, "length_penalty": 2, "early_stopping": False}},
        {"prompt": "count", "sampling": {"num_beams": 2, "early_stopping": "never"}},
        {"prompt": "count"},
    ]
    (tmp_path / "in.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    words = ["--input_file", str(tmp_path / "in.jsonl"), "--output_file", str(tmp_path / "out.jsonl")]
    assert cli.main(["generate", model, *words, "--decode_strategy", "beam_search", "--num_beams", "4"]) == 0
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [answer["output"] for answer in answers] == ["one two three"] * 3
    assert answers[0]["score"] >= answers[0]["others"][0]["score"] and len(answers[0]["others"]) == 1
    assert answers[2]["score"] == pytest.approx(answers[0]["score"] * answers[0]["num_tokens"])
    for words, message in [
        (["--num_beams", "2", "--temperature", "1"], "a beam search does not draw"),
        (["--num_beams", "2", "--n", "3"], "n 3 is more than num_beams 2"),
    ]:
        assert cli.main(["generate", model, "count", *words]) != 0
        assert message in capsys.readouterr().err


def test_the_memory_of_the_cache(chain_model, capsys):
    model = str(chain_model("one two"))
    assert cli.main(["generate", model, "count", "--cache_gib", "0.01"]) == 0
    assert capsys.readouterr().out == "one two\n"
    assert cli.main(["generate", model, "count", "--cache_gib", "1e-9"]) != 0
    assert "cache_bytes is 1; a page of 64 tokens has" in capsys.readouterr().err
