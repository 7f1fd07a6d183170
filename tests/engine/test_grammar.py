"""Answers held to a constraint: whatever a model prefers, what comes out matches."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from made_tokenizers import byte_fallback
from oarsmith.engine import Sampling
from oarsmith.engine.draws import Draws
from oarsmith.engine.grammar import MAX_CHARACTERS, Constraints
from oarsmith.engine.sampler import choose
from oarsmith.engine.state import SamplingState
from oarsmith.errors import ConfigError, MissingExtraError, OarsmithError
from oarsmith.text import Tokenizer, load_tokenizer
from remote_tokenizers import CASES as REMOTE
from remote_tokenizers import FIXTURES, directory

pytest.importorskip("llguidance", reason="pip install 'oarsmith[constrained]'")

LOCAL = ["baichuan2_spm", "chatglm2_spm", "gpt2_vocab_merges", "llama2_spm_legacy", "qwen1_tiktoken", "qwen25_bpe_json"]
PADDING = 14

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "kind": {"enum": ["person", "ロボット", None, 3]},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "share": {"type": "number", "minimum": -1, "maximum": 1},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{2,4}$"}, "minItems": 1, "maxItems": 3},
        "home": {
            "type": "object",
            "properties": {"zip": {"type": "string", "pattern": "^[0-9]{5}$"}, "flat": {"type": "boolean"}},
            "required": ["zip", "flat"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "kind", "age", "share", "tags", "home"],
    "additionalProperties": False,
}


def tokenizer_of(case: str, path: Path) -> Tokenizer:
    if case in REMOTE:
        return load_tokenizer(directory(case, path))
    if case == "bytes":
        tokenizer = byte_fallback(path)
        tokenizer.stop_ids = (2,)
        return tokenizer
    return load_tokenizer(FIXTURES / case)


@pytest.fixture(scope="module")
def qwen() -> Tokenizer:
    return load_tokenizer(FIXTURES / "qwen25_bpe_json")


def answers(tokenizer: Tokenizer, samplings: list[Sampling], *, seed: int = 0, steps: int = 400) -> list[str | None]:
    """Texts that random logits make, all in one batch; None: not at its end after so many steps."""
    size = tokenizer.vocab_size + PADDING
    constraints, generator = Constraints(tokenizer, size), torch.Generator().manual_seed(seed)
    states = [
        SamplingState(
            sampling,
            [],
            Draws(str(100 * seed + row)),
            vocab_size=size,
            grammar=constraints.of(sampling),
            stop_ids=tokenizer.stop_ids,
        )
        for row, sampling in enumerate(samplings)
    ]
    texts: dict[int, str] = {}
    for _ in range(steps):
        open_rows = [row for row in range(len(states)) if row not in texts]
        if not open_rows:
            break
        choices = choose(torch.randn(len(open_rows), size, generator=generator) * 4, [states[r] for r in open_rows])
        for row, choice in zip(open_rows, choices, strict=True):
            if choice.token in tokenizer.stop_ids and states[row].grammar is not None:
                texts[row] = tokenizer.decode(states[row].answer, skip_special_tokens=False)
            else:
                states[row].accept(choice.token)
    return [texts.get(row) for row in range(len(states))]


def check_person(text: str) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(json.loads(text), PERSON)


@pytest.mark.parametrize("seed", range(4))
def test_json_is_what_the_schema_allows(qwen: Tokenizer, seed: int) -> None:
    greedy, drawn = Sampling(json_schema=PERSON), Sampling(json_schema=json.dumps(PERSON), temperature=1.0, top_k=20)
    texts = answers(qwen, [greedy, drawn, Sampling(), Sampling(temperature=1.0, top_p=0.9)], seed=seed)
    assert texts[0] is not None and texts[1] is not None
    check_person(texts[0])
    check_person(texts[1])


@pytest.mark.parametrize("case", [*LOCAL, *REMOTE, "bytes"])
def test_every_kind_of_tokenizer(case: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(case, tmp_path)
    pattern = r"(é|日本|[0-9]{3}) (foo|\[x\])\n?"
    samplings = [
        Sampling(regex=pattern, temperature=1.0),
        Sampling(choices=["yes, it is", "no\t1", "ab.a"]),
        Sampling(json_schema=PERSON["properties"]["home"]),
    ]
    for seed in range(3):
        first, second, third = answers(tokenizer, samplings, seed=seed)
        assert first is not None and re.fullmatch(pattern, first), first
        assert second in ("yes, it is", "no\t1", "ab.a")
        assert third is not None and set(json.loads(third)) == {"zip", "flat"}


def test_a_choice_is_taken_literally(qwen: Tokenizer) -> None:
    choices = [
        'quote " and \\ and \\n',
        "line\nfeed\ttab",
        "日本語 😀",
        "\u2028\x7f",
        "a.*b",
        "${x}",
        "</s>",
        "<|im_end|>",
    ]
    for choice in choices:
        assert answers(qwen, [Sampling(choices=[choice])]) == [choice]


def test_a_grammar(qwen: Tokenizer) -> None:
    grammar = 'start: sum\nsum: NUMBER | "(" sum "+" sum ")"\nNUMBER: /[1-9][0-9]?/'
    found = answers(qwen, [Sampling(grammar=grammar, temperature=1.0)] * 12, steps=200)
    done = [text for text in found if text is not None]
    assert len(done) >= 4
    for text in done:
        assert re.fullmatch(r"[0-9+()]+", text) and eval(text) > 0


def test_json_object(qwen: Tokenizer) -> None:
    found = answers(qwen, [Sampling(json_object=True, temperature=1.0)] * 30, steps=60)
    done = [json.loads(text) for text in found if text is not None]
    assert done and all(isinstance(value, dict) for value in done)


def test_special_tokens_are_no_text(qwen: Tokenizer) -> None:
    grammar = Constraints(qwen, qwen.vocab_size + PADDING).of(Sampling(regex="(.|\n)+"))
    assert grammar is not None
    mask = grammar.allowed()
    assert len(mask) == qwen.vocab_size + PADDING
    assert not any(mask[index] for index in qwen.special_ids)
    assert not any(mask[qwen.vocab_size :])
    # The end only once the text is complete.
    grammar.accept(qwen.encode("a")[0])
    mask = grammar.allowed()
    assert all(mask[index] for index in qwen.stop_ids)
    assert sum(map(bool, (mask[index] for index in qwen.special_ids))) == len(qwen.stop_ids)


def test_what_is_complete_ends_however_long_it_should_be(qwen: Tokenizer) -> None:
    """The constraint decides, then the minimum: an answer that can go on does, one that cannot ends."""
    closed, opened = Sampling(choices=["a"], min_new_tokens=20), Sampling(regex="[ab]+", min_new_tokens=20)
    texts = answers(qwen, [closed, opened])
    assert texts[0] == "a"
    assert texts[1] is not None and re.fullmatch("[ab]{20,}", texts[1])


def test_bad_words_and_bias_choose_among_what_is_allowed(qwen: Tokenizer) -> None:
    one, two = qwen.encode("1")[0], qwen.encode("2")[0]
    assert answers(qwen, [Sampling(regex="[123]{6}", logit_bias={two: 100.0})]) == ["222222"]
    assert answers(qwen, [Sampling(regex="[12]{6}", logit_bias={one: -100.0, two: -100.0})])[0] is not None


def test_answers_of_one_constraint_do_not_share_their_place(qwen: Tokenizer) -> None:
    constraints = Constraints(qwen, qwen.vocab_size)
    first, second = (constraints.of(Sampling(choices=["ab", "cd"])) for _ in range(2))
    assert first is not None and second is not None
    first.accept(qwen.encode("a")[0])
    assert sum(map(bool, first.allowed())) == 1
    assert sum(map(bool, second.allowed())) > 1


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "type": ({"json_schema": {"type": "nope"}}, "Invalid type: nope"),
    "pattern": ({"json_schema": {"type": "string", "pattern": "("}}, "unclosed group"),
    "keyword": ({"json_schema": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
    "lenient": ({"json_schema": {"x-guidance": {"lenient": True}, "if": {}}}, "if"),
    "reference": ({"json_schema": {"$ref": "#/$defs/none"}}, "/$defs/none"),
    "address": ({"json_schema": {"$ref": "http://example.com/x.json"}}, "http://example.com/x.json"),
    "file": ({"json_schema": {"$ref": "file:///etc/passwd"}}, "file:///etc/passwd"),
    "nothing": ({"json_schema": {"type": "object", "properties": {"a": False}, "required": ["a"]}}, "schema"),
    "bounds": ({"json_schema": {"type": "integer", "minimum": 3, "maximum": 2}}, "minimum (3) is greater"),
    "circle": ({"json_schema": {"$ref": "#"}}, "no text matches it"),
    "deep": ({"json_schema": '{"items":' * 300 + "{}" + "}" * 300}, "recursion limit exceeded"),
    "no json": ({"json_schema": {"enum": [object()]}}, "not JSON"),
    "long": ({"regex": "a" * (MAX_CHARACTERS + 1)}, f"regex has {MAX_CHARACTERS + 1:,} characters"),
    "group": ({"regex": "(a"}, "unclosed group"),
    "back": ({"regex": r"(a)\1"}, "backreferences are not supported"),
    "rule": ({"grammar": 'start: other "a"'}, 'unknown name: "other"'),
    "start": ({"grammar": 'other: "a"'}, "no start rule found"),
    "import": ({"grammar": "%import os\nstart: os"}, "os"),
    "endless": ({"grammar": "start: start"}, "no text matches it"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_what_is_wrong_is_named(qwen: Tokenizer, case: str) -> None:
    values, what = FAULTS[case]
    (name,) = values
    with pytest.raises(ConfigError) as caught:
        Constraints(qwen, qwen.vocab_size).of(Sampling(**values))
    assert caught.value.where == name
    assert what in caught.value.what and len(caught.value.what) < 600


HOSTILE = """
import json, resource, sys, time
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
from oarsmith.engine import Sampling
from oarsmith.engine.grammar import Constraints
from oarsmith.errors import OarsmithError
from oarsmith.text import load_tokenizer
tokenizer = load_tokenizer(sys.argv[1])
constraints = Constraints(tokenizer, tokenizer.vocab_size)
constraints.of(Sampling(regex="a"))
before, spent = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, {}
many = {f"p{i}": {"type": "string"} for i in range(8000)}
cases = {
    "properties": {"json_schema": {"type": "object", "properties": many, "additionalProperties": False}},
    "length": {"json_schema": {"type": "string", "minLength": 10**9}},
    "items": {"json_schema": {"type": "array", "minItems": 10**9}},
    "product": {"json_schema": {"allOf": [
        {"anyOf": [{"properties": {f"a{i}{j}": {"type": "string"}}} for j in range(4)]} for i in range(8)]}},
    "repeat": {"regex": "((.{1,1000}){1,1000}){1,1000}x"},
    "alternatives": {"regex": "|".join(f"x{i}y" for i in range(30000))},
    "states": {"regex": "(a|b)*a(a|b){900}"},
    "ambiguous": {"grammar": "start: x\\nx: x x | \\"a\\" | \\"\\""},
    "choices": {"choices": [f"choice {i}" for i in range(15000)]},
}
letter = tokenizer.encode("a")[0]
for name, values in cases.items():
    start = time.process_time()
    try:
        grammar = constraints.of(Sampling(**values))
        for _ in range(200):
            mask = grammar.allowed()
            token = letter if mask[letter] else next(index for index, value in enumerate(mask) if value)
            if token in tokenizer.stop_ids:
                break
            grammar.accept(token)
    except OarsmithError as error:
        pass
    spent[name] = time.process_time() - start
used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps({"seconds": spent, "kib": used}))
"""


@pytest.mark.slow
def test_hostile_constraints_stay_within_bounds() -> None:
    """Compiling and 200 steps; each costs seconds at most, all of them together little memory."""
    command = [sys.executable, "-c", HOSTILE, str(FIXTURES / "qwen25_bpe_json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert max(found["seconds"].values()) < 10, found
    assert found["kib"] < 2**20, found


def test_a_constraint_that_grows_too_complex_ends_one_answer_alone(qwen: Tokenizer) -> None:
    class Exhausted:
        def allowed(self) -> bytearray:
            raise OarsmithError("regex cannot be followed any further")

        def accept(self, token: int) -> None: ...

    size = qwen.vocab_size
    states = [
        SamplingState(Sampling(), [], Draws(""), vocab_size=size, grammar=grammar)
        for grammar in (Exhausted(), Constraints(qwen, size).of(Sampling(choices=["a"])))
    ]
    choices = choose(torch.randn(2, size), states)
    assert choices[1].token == qwen.encode("a")[0]
    states[1].accept(choices[1].token)
    with pytest.raises(OarsmithError, match="any further"):
        states[0].accept(choices[0].token)


def test_a_token_that_is_not_allowed_is_noticed(qwen: Tokenizer) -> None:
    grammar = Constraints(qwen, qwen.vocab_size).of(Sampling(choices=["ab"]))
    assert grammar is not None
    with pytest.raises(OarsmithError, match="choices cannot be followed any further"):
        grammar.accept(qwen.encode("z")[0])


def test_without_a_tokenizer_or_its_end() -> None:
    with pytest.raises(ConfigError, match="has no tokenizer"):
        Constraints(None, 100).of(Sampling(regex="a"))
    assert Constraints(None, 100).of(Sampling()) is None
    endless = load_tokenizer(FIXTURES / "qwen25_bpe_json")
    endless.stop_ids = ()
    with pytest.raises(ConfigError, match="could not end"):
        Constraints(endless, endless.vocab_size).of(Sampling(regex="a"))


def test_the_missing_library_is_named(qwen: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingExtraError) as caught:
        Constraints(qwen, qwen.vocab_size).of(Sampling(regex="a"))
    assert "oarsmith[constrained]" in (caught.value.fix or "")
