"""Verifiers by their settings: what each gives to which answer."""

from __future__ import annotations

import itertools
import random
import sys
import time

import jsonschema
import pytest

from oarsmith.errors import ConfigError, OarsmithError
from oarsmith.rl.completion import Completion
from oarsmith.rl.rewards.rewards import Rewards
from oarsmith.rl.rewards.values import RewardError
from oarsmith.rl.rewards.verifiers.schema import Schema


def score(
    settings: object, text: str = "", *, tokens: int = 0, own: tuple[bool, ...] = (), **row: object
) -> float | None:
    one = Completion("q", text, tuple(range(tokens)), row=row, own=own)
    (found,) = Rewards.from_settings(settings).score([one]).total  # type: ignore[arg-type]
    return found


def test_maths() -> None:
    assert score("maths", "So 3*4 = 12.", answer="12") == 1.0 and score("maths", "13", answer=12) == 0.0
    assert score("maths", "it is \\boxed{\\frac{1}{2}}", answer=["3", "0.5"]) == 1.0
    assert score("maths", "72", answer="48/2 = 24 clips in May. 48+24 = 72\n#### 72") == 1.0
    shaped = {"reward": "maths", "right": 2.0, "wrong": -1.0, "missing": -2.0, "marked_only": True}
    assert [score(shaped, text, answer="7") for text in ("#### 7", "#### 8", "7")] == [2.0, -1.0, -2.0]
    with pytest.raises(RewardError, match="no text or list of texts"):
        score("maths", "1", answer={"a": 1})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1, "b": "x"}', 1.0),
        ('  {"a": 1, "b": "x"}\n', 1.0),
        ('{"a": 1}', 0.5),
        ('{"b": 1}', 0.5),
        ("[1]", 0.25),
        ('{"a": NaN, "b": "x"}', 0.0),
        ('{"a": 1, "a": 2, "b": "x"}', 0.0),
        ('Here: {"a": 1, "b": "x"}', 0.0),
        ('```json\n{"a": 1, "b": "x"}\n```', 0.0),
        ("[" * 100_000, 0.0),
        ("1" * 10_000, 0.0),
        ("", 0.0),
    ],
)
def test_json(text: str, expected: float) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "string"}},
        "required": ["a", "b"],
    }
    settings = {"reward": "json", "keys": ["a", "b"], "json_schema": schema}
    assert score(settings, text) == expected
    assert score({**settings, "partial": False}, text) == float(expected == 1.0)


def test_json_of_rows() -> None:
    by_row = {"reward": "json", "keys_column": "wanted", "schema_column": "form", "fenced": True}
    text = 'Sure:\n```json\n{"a": 1}\n```\nDone.'
    assert score(by_row, text, wanted=["a"], form='{"required": ["b"]}') == pytest.approx(2 / 3)
    assert score(by_row, text, wanted=["a"], form={"required": ["a"]}) == 1.0
    for row in ({"wanted": "a", "form": {}}, {"wanted": ["a"], "form": "{"}, {"wanted": ["a"], "form": {"typ": 1}}):
        with pytest.raises(RewardError, match="answer 1 of 1"):
            score(by_row, text, **row)
    with pytest.raises(ConfigError, match="both given"):
        score({"reward": "json", "keys": ["a"], "keys_column": "b"})


SCHEMAS = [
    {"type": ["integer", "null"]}, {"type": "number", "minimum": 1, "exclusiveMaximum": 3}, {"multipleOf": 0.5},
    {"enum": [1, "a", None, [1]]}, {"const": {"a": [True]}}, {"minLength": 1, "maxLength": 2, "pattern": "^a"},
    {"items": {"type": "integer"}, "minItems": 1, "maxItems": 2, "uniqueItems": True}, {"contains": {"const": 1}},
    {"prefixItems": [{"type": "string"}], "items": {"type": "integer"}}, {"not": {"type": "string"}}, True, False,
    {"properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False},
    {"patternProperties": {"^b": {"type": "string"}}, "additionalProperties": {"type": "boolean"}},
    {"propertyNames": {"maxLength": 1}, "minProperties": 1, "maxProperties": 1}, {"dependentRequired": {"a": ["b"]}},
    {"anyOf": [{"type": "string"}, {"minimum": 2}]}, {"oneOf": [{"type": "number"}, {"minimum": 2}]},
    {"allOf": [{"type": "number"}, {"minimum": 2}]},
    {"$defs": {"n": {"type": "integer"}}, "items": {"$ref": "#/$defs/n"}},
    {"if": {"type": "string"}, "then": {"minLength": 2}, "else": {"type": "integer"}},
]  # fmt: skip
VALUES = [
    None, True, False, 0, 1, 1.0, 1.5, 2, 3, -1, "", "a", "ab", "abc", [], [1], [1, 1], [1, True], [1, 2, 3], ["a", 1],
    [[1]], {}, {"a": 1}, {"a": "x"}, {"a": 1, "b": "y"}, {"b": "y"}, {"b": 1}, {"c": True}, {"a": [True]}, {"a": [1]},
]  # fmt: skip


def test_schemas_as_the_library_has_them() -> None:
    for schema, value in itertools.product(SCHEMAS, VALUES):
        expected = jsonschema.Draft202012Validator(schema).is_valid(value)
        assert Schema(schema).fits(value) == expected, (schema, value)


def test_schemas_that_cannot_be_checked() -> None:
    deep: object = {}
    for _ in range(100):
        deep = {"items": deep}
    for schema, part in (
        ({"unevaluatedProperties": False}, "'unevaluatedProperties' is not known"),
        ({"properties": {"a": 3}}, "an? int is no JSON schema"),
        ({"type": "text"}, "there is no type 'text'"),
        ({"$ref": "#/nowhere"}, "leads nowhere"),
        ({"$ref": "http://example.org/schema"}, "leads nowhere"),
        ({"pattern": "("}, "no pattern"),
        (deep, "nested deeper"),
    ):
        with pytest.raises(ConfigError, match=part):
            Schema(schema)
    assert not Schema({"$ref": "#"}).fits(1)


def test_exact() -> None:
    assert score("exact", "  The Eiffel-Tower! ", answer="eiffeltower") == 1.0
    assert (
        score("exact", "An apple", answer=["pear", "apple"]) == 1.0 and score("exact", "apples", answer="apple") == 0.0
    )
    strict = {"reward": "exact", "normalise": False}
    assert score(strict, "a ", answer="a") == 0.0 and score(strict, "a", answer="a") == 1.0
    assert score({"reward": "exact", "part": "contains"}, "it is Paris, of course", answer="paris") == 1.0
    assert score({"reward": "exact", "part": "contains"}, "comparison", answer="paris") == 0.0
    assert score({"reward": "exact", "part": "final"}, "maybe B. The answer is C.", answer="C") == 1.0
    assert score({"reward": "exact", "part": "final"}, "C", answer="C") == 0.0


def test_regex() -> None:
    settings = {"reward": "regex", "pattern": r"a.c"}
    assert score(settings, "xa\nc") == 1.0 and score({**settings, "dot_all": False}, "xa\nc") == 0.0
    assert score({**settings, "whole": True, "wrong": -1.0}, "xabc") == -1.0
    began = time.monotonic()
    with pytest.raises(RewardError, match=r"'\(a\+\)\+\$' took longer than 0\.5 s"):
        score({"reward": "regex", "pattern": "(a+)+$", "timeout": 0.5}, "a" * 40 + "b")
    assert time.monotonic() - began < 5


def test_format() -> None:
    good = "<think>a b</think>\n<answer>4</answer>"
    assert score("format", good) == 1.0 and score("format", good + " more") == pytest.approx(0.8)
    assert score("format", "<think>a</think> 4") == pytest.approx(0.4) and score("format", "4") == 0.0
    assert score({"reward": "format", "partial": False, "value": 0.5}, good) == 0.5
    assert score({"reward": "format", "partial": False}, "<answer>4</answer><think>a</think>") == 0.0
    assert score({"reward": "format", "partial": False}, "<think><think>a</think></think><answer>4</answer>") == 0.0


def test_length() -> None:
    settings = {"reward": "length", "at_least": 4, "at_most": 10, "penalty": 2.0}
    assert [score(settings, tokens=n) for n in (0, 2, 4, 10, 15, 20, 90)] == [-2.0, -1.0, 0.0, 0.0, -1.0, -2.0, -2.0]
    assert (
        score({**settings, "unit": "words"}, "a b") == -1.0 and score({**settings, "unit": "characters"}, "abc") == -0.5
    )
    assert score(settings, tokens=12, own=(True,) * 10 + (False,) * 2) == 0.0
    for wrong in ({"reward": "length"}, {"reward": "length", "at_least": 4, "at_most": 2}):
        with pytest.raises(ConfigError, match=r"length|at_most"):
            score(wrong)


def test_overlong_is_dapo_s() -> None:
    """Equation 13 with L_max 16,384 + 4,096 and a cache of 4,096 in small: 20 and 4."""
    settings = {"reward": "overlong", "max_length": 20, "buffer": 4}
    assert [score(settings, tokens=n) for n in (0, 16, 17, 18, 20, 21)] == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]
    with pytest.raises(ConfigError, match="buffer 30 is more"):
        score({"reward": "overlong", "max_length": 20, "buffer": 30})


def test_repetition() -> None:
    settings = {"reward": "repetition", "ngram": 2, "penalty": 3.0}
    assert score(settings, "a b c d") == 0.0 and score(settings, "") == 0.0
    assert score(settings, "a b a b a b") == pytest.approx(-3.0 * (1 - 2 / 5))
    assert score({**settings, "unit": "tokens"}, tokens=9) == 0.0


@pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")
def test_code() -> None:
    try:
        rewards = Rewards.from_settings({"reward": "code", "seconds": 1.0, "partial": True})
    except OarsmithError as error:
        pytest.skip(str(error))
    tests = ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]
    answers = [
        "Sure:\n```python\ndef add(a, b):\n    return a + b\n```\nThat is it.",
        "def add(a, b):\n    return a * b",
        "```python\nimport os; os._exit(0)\n```",
        "```\nwhile True: pass\n```",
        "no program at all",
    ]
    scores = rewards.score([Completion("q", text, (), row={"tests": tests}) for text in answers])
    assert scores.total == [1.0, 0.5, 0.0, 0.0, 0.0]
    settings = {"reward": "code", "kind": "stdin", "column": "cases"}
    cases = [{"input": "1 2\n", "output": "3"}, ["4 5", "9\n"]]
    program = "print(sum(map(int, input().split())))"
    assert score(settings, program, cases=cases) == 1.0
    assert score(settings, "print(3)", cases=cases) == 0.0
    assert score({**settings, "partial": True}, "print(3)", cases=cases) == 0.5
    with pytest.raises(RewardError, match="no list of input and output"):
        score(settings, program, cases=["1"])


def test_random_texts_break_nothing() -> None:
    draw = random.Random(3)
    pieces = [
        "\\boxed{",
        "}",
        "####",
        "1",
        "/",
        "0",
        "\\frac",
        "{",
        "<think>",
        "</think>",
        '"',
        "[",
        ",",
        "\ud800",
        "\x00",
        "é",
    ]
    rewards = Rewards.from_settings(
        ["maths", "json", "exact", "format", "repetition", {"reward": "regex", "pattern": "a"}]
    )
    texts = ["".join(draw.choices(pieces, k=draw.randrange(40))) for _ in range(300)]
    scores = rewards.score([Completion("q", text, (), row={"answer": "1"}) for text in texts])
    assert all(isinstance(value, float) for values in scores.parts.values() for value in values)
