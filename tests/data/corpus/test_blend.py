"""A blend's description is read as meant, and its order keeps the proportions at every point."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oarsmith.data.corpus.blend import BlendOrder, Component, parse_blend
from oarsmith.data.corpus.indexed import IndexedBuilder
from oarsmith.errors import DataError


def make(*prefixes):
    for prefix in prefixes:
        with IndexedBuilder(prefix, np.uint16) as builder:
            builder.add_documents([1, 2], [2])


def test_forms_of_input(tmp_path):
    a, b, c = tmp_path / "a", tmp_path / "many" / "b", tmp_path / "many" / "c.d"
    make(a, b, c)
    (tmp_path / "many" / ".tmp-x.idx").touch()
    assert parse_blend(str(a)) == (Component(a, 1.0),)
    assert parse_blend(f"{a}.bin") == parse_blend(f"{a}.idx") == (Component(a, 1.0),)
    assert parse_blend(str(c)) == (Component(c, 1.0),)
    assert parse_blend(f"3 {a}  1 {b}") == (Component(a, 0.75), Component(b, 0.25))
    assert parse_blend(str(tmp_path / "many")) == (Component(b, 0.5), Component(c, 0.5))
    assert parse_blend(f"0.5 {a} .5 {tmp_path / 'many'}") == (Component(a, 0.5), Component(b, 0.25), Component(c, 0.25))


def test_a_path_with_a_space(tmp_path):
    make(tmp_path / "a b" / "c")
    assert parse_blend(str(tmp_path / "a b" / "c")) == (Component(tmp_path / "a b" / "c", 1.0),)
    assert parse_blend(str(tmp_path / "a b")) == (Component(tmp_path / "a b" / "c", 1.0),)


def test_numpy_pairs_of_a_directory_count_too(tmp_path):
    make(tmp_path / "a")
    np.savez(tmp_path / "b_idx.npz")
    assert [component.prefix.name for component in parse_blend(str(tmp_path))] == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no path"),
        ("0.7 a 0.3", "3 words"),
        ("a b", "'a' stands where a weight"),
        ("0.7 a -1 b", "weight -1"),
        ("0 a 1 b", "weight 0"),
        ("nan a 1 b", "weight nan"),
        ("inf a 1 b", "weight inf"),
        ("missing", "neither missing.idx nor missing_idx.npz"),
        ("1 missing 2 b", "neither missing.idx"),
        ("empty", "has no .idx"),
    ],
)
def test_what_is_no_blend(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message) as caught:
        parse_blend(text)
    assert caught.value.fix


def greedy(weights, num):
    """One by one, each from the file furthest behind: the least (n + 1/2) / w, the first of equals."""
    shares = np.array(weights) / sum(weights)
    counts, found = np.zeros(len(weights)), []
    for _ in range(num):
        file = int(np.argmin((counts + 0.5) / shares))
        found.append((file, int(counts[file])))
        counts[file] += 1
    return found


WEIGHTS = st.lists(st.one_of(st.floats(1e-3, 1e3), st.integers(1, 5).map(float)), min_size=1, max_size=7)


@settings(max_examples=150, deadline=None)
@given(WEIGHTS, st.integers(1, 300))
def test_the_order_is_the_greedy_one(weights, num):
    order = BlendOrder(weights)
    wanted = greedy(weights, num)
    assert [order.locate(index) for index in range(num)] == wanted
    counts = np.bincount([file for file, _ in wanted], minlength=len(weights))
    assert order.counts(num).tolist() == counts.tolist()


def test_blocks_join_without_a_seam():
    weights = [0.61, 0.3, 0.05, 0.04]
    wanted, order = greedy(weights, 40_000), BlendOrder(weights)
    places = [*range(16_300, 16_500), *range(32_700, 32_900), 39_999, 0, 16_384, 5]
    assert [order.locate(index) for index in places] == [wanted[index] for index in places]
    for num in (0, 1, 16_383, 16_384, 16_385, 40_000):
        counts = np.bincount([file for file, _ in wanted[:num]], minlength=4)
        assert order.counts(num).tolist() == counts.tolist()


@settings(max_examples=60, deadline=None)
@given(WEIGHTS, st.integers(0, 10**9))
def test_proportions_hold_at_any_place(weights, num):
    """At time t every count is within 1/2 of w t, and they add up to num: so t is within half the files of it."""
    shares = np.array(weights) / sum(weights)
    counts = BlendOrder(weights).counts(num)
    assert counts.sum() == num
    bound = 0.5 + shares * len(weights) / 2 + 1e-6  # rounding of w x 1e9
    assert (np.abs(counts - shares * num) <= bound).all()


def test_any_place_is_found_at_once():
    order = BlendOrder([0.7, 0.3])
    assert order.counts(10**12).tolist() == [7 * 10**11, 3 * 10**11]
    file, number = order.locate(10**12)
    assert number == order.counts(10**12)[file]
