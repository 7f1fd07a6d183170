"""Whether answers are the same: cases of maths data sets, and a computer algebra as the judge of random expressions."""

from __future__ import annotations

import random
import time

import pytest
import sympy

from oarsmith.rl.rewards.verifiers.answers import final_answer
from oarsmith.rl.rewards.verifiers.equality import equal

SAME = [
    ("1/2", "0.5"), ("\\frac12", "0.5"), ("\\dfrac{1}{2}", "\\tfrac12"), ("50%", "0.5"), ("50", "50%"), ("50\\%", "50"),
    ("1,234", "1234"), ("$1,234.00", "1234"), ("1{,}000", "1000"), ("x=5", "5"), ("(1,2)", "(1, 2)"), ("5", "x = 5"),
    ("\\{2,1\\}", "\\{1,2\\}"), ("1, 2", "2,1"), ("2\\sqrt{3}", "\\sqrt{12}"), ("(x+1)^2", "x^2+2x+1"),
    ("\\frac{\\sqrt2}{2}", "1/\\sqrt{2}"), ("1\\frac12", "3/2"), ("10^{3}", "1000"), ("\\text{Blue}", "blue"),
    ("5\\text{ cm}", "5"), ("90^\\circ", "90"), ("\\sin^2 x+\\cos^2 x", "1"), ("e^{i\\pi}", "-1"), ("\\log_2 8", "3"),
    ("5!", "120"), ("|{-3}|", "3"), ("y=2x+1", "2x-y+1=0"), ("2x + 4 = 0", "x + 2 = 0"), ("[0,1)", "[0, 1)"),
    ("\\left(\\frac{1}{2}, 3\\right)", "(0.5,3)"), ("-\\frac{3}{4}", "-0.75"), ("3.0", "3"), ("1e3", "1000"),
    ("2^{10}", "1024"), ("\\pi r^2", "r^2\\pi"), ("A", "a"), ("\\sqrt[3]{8}", "2"), ("x^{-1}", "1/x"), ("3 × 4", "12"),
    ("\\text{(B)}", "(b)"), ("2x", "x\\cdot2"), ("a_1+a_2", "a_{2}+a_{1}"), ("−3", "-3"), ("42.", "42"), ("$7$", "7"),
    ("((1, 2), 3)", "((1,2),3)"), ("\\frac{x^2-1}{x-1}", "x+1"), ("\\ln e^2", "2"), ("18 \\text{ dollars}", "\\$18"),
]  # fmt: skip
OTHER = [
    ("2", "3"), ("(1,2)", "(2,1)"), ("x", "y"), ("", ""), ("[0,1]", "[0,1)"), ("9**9**9**9", "1"), ("(" * 5000, "1"),
    ("x^2", "x^3"), ("1/0", "1/0+1"), ("3.14", "\\pi"), ("0.333333", "1/3"), ("1,2", "1,2,3"), ("-x", "x"), ("12", "1"),
    ("x=1", "y=2"), ("1000000000000001", "1000000000000000"), ("2^{100}", "2^{100}+1"), ("\\sqrt{x^2}", "x"),
    ("99999999!", "1"), ("10^{10^{10}}", "1"), ("1e999", "2e999"), ("blue", "red"),
    ("__import__('os')", "1"), ("%", "1"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "reference"), SAME)
def test_the_same(answer: str, reference: str) -> None:
    assert equal(answer, reference) and equal(reference, answer)


@pytest.mark.parametrize(("answer", "reference"), OTHER)
def test_another(answer: str, reference: str) -> None:
    began = time.monotonic()
    assert not equal(answer, reference) and not equal(reference, answer)
    assert time.monotonic() - began < 0.5


def expression(draw: random.Random, depth: int) -> str:
    if depth == 0:
        return draw.choice(["x", "y", "2", "3", "7", "0.5", "\\frac{1}{3}"])
    a, b = expression(draw, depth - 1), expression(draw, draw.randrange(depth))
    return draw.choice([f"({a}) + ({b})", f"({a}) - ({b})", f"({a}) \\cdot ({b})", f"({a})^2", f"\\frac{{{a}}}{{{b}}}"])


def plain(text: str) -> str:
    import re

    while "\\frac" in text:
        text = re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"((\1)/(\2))", text)
    return text.replace("\\cdot", "*").replace("^", "**")


def test_against_a_computer_algebra() -> None:
    """Random rational expressions in pairs: equal where sympy's difference cancels to 0."""
    draw, agreed, equals = random.Random(7), 0, 0
    for _ in range(300):
        first = expression(draw, draw.randrange(1, 3))
        second = expression(draw, draw.randrange(1, 3)) if draw.random() < 0.5 else first
        one = sympy.sympify(plain(first), rational=True)
        if one.has(sympy.zoo, sympy.nan):
            continue
        if second is first:
            second = str(sympy.expand(one)).replace("**", "^")
        two = sympy.sympify(plain(second), rational=True)
        if two.has(sympy.zoo, sympy.nan):
            continue
        expected = sympy.cancel(one - two) == 0
        assert equal(first, second) == expected, (first, second)
        agreed, equals = agreed + 1, equals + expected
    assert agreed > 100 and 30 < equals < agreed - 20


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so \\boxed{\\frac{1}{2}} ok", "\\frac{1}{2}"),
        ("\\boxed{1} then \\boxed{2", "1"),
        ("a 3 then #### 1,000\n", "1,000"),
        ("#### 5 and \\boxed{6}", "6"),
        ("The answer is **42**.", "42"),
        ("Final answer: 3.5\nthank you", "3.5"),
        ("The answer is 5. It is 7 apples.", "5"),
        ("I have 3 and 1/2", "1/2"),
        ("costs $1,234.50 in all", "1,234.50"),
        ("from 10 to -3", "-3"),
        ("<think>5</think> none", None),
        ("<think>\\boxed{5}</think> It is 6", "6"),
        ("nothing", None),
        ("", None),
        ("\\boxed{" * 3000, None),
    ],
)
def test_where_the_answer_stands(text: str, expected: str | None) -> None:
    assert final_answer(text) == expected


def test_only_marked_answers() -> None:
    assert final_answer("it is 7", anywhere=False) is None and final_answer("#### 7", anywhere=False) == "7"


@pytest.mark.parametrize(
    "text", ["1," * 100_000, "{" * 200_000, "\\boxed{{" * 20_000, "9" * 200_000, "answer is " * 20_000]
)
def test_long_texts_take_no_time(text: str) -> None:
    began = time.monotonic()
    equal(final_answer(text) or "", "1")
    assert time.monotonic() - began < 2
