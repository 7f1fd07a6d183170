"""Cleaning a document: the sampled search for runs is the regular expression's, on any text."""

import re

from hypothesis import given
from hypothesis import strategies as st

from oarsmith.data.corpus.clean import Cleaning

# Pieces long enough for runs beyond every limit, and short ones that break them.
PIECES = st.lists(
    st.tuples(st.sampled_from(["a", " ", "\n", "中", "🙂"]), st.integers(1, 130)).map(lambda p: p[0] * p[1]), max_size=8
)


@given(PIECES, st.sampled_from([1, 2, 15, 16, 17, 30, 99, 100]))
def test_collapse_is_the_regular_expression(pieces, longest):
    text = "".join(pieces)
    expected = re.sub(rf"(.)\1{{{longest},}}", r"\1", text, flags=re.DOTALL)
    assert Cleaning(max_repeated=longest).collapse(text) == expected


def test_a_run_of_just_the_limit_stays():
    clean = Cleaning(max_repeated=100)
    assert clean.collapse("x" + "-" * 100 + "y") == "x" + "-" * 100 + "y"
    assert clean.collapse("x" + "-" * 101 + "y") == "x-y"


def test_an_unchanged_text_is_the_same_object():
    text = "nothing to do here"
    assert Cleaning().collapse(text) is text


def test_zero_leaves_runs():
    assert Cleaning(max_repeated=0).collapse("a" * 1000) == "a" * 1000


def test_length_is_counted_without_white_space_around():
    clean = Cleaning(min_length=3)
    assert clean.too_short("  ab \n") and not clean.too_short(" abc ")
    assert Cleaning(min_length=0).too_short(" \n")
