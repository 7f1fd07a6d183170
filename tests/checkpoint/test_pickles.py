"""The pickle machine: plain values as Python's own reader gives them, everything else refused in bounded time."""

from __future__ import annotations

import collections
import io
import pickle
from collections.abc import Callable

import pytest

from oarsmith.checkpoint.pickles import FileBytes, PickleMachine, Vocabulary
from oarsmith.errors import CheckpointError

EMPTY = Vocabulary(calls={"collections OrderedDict": lambda arguments: {}}, values={})


def play(data: bytes, vocabulary: Vocabulary = EMPTY) -> object:
    return PickleMachine(io.BytesIO(data), 0, len(data), where="test", vocabulary=vocabulary).load()


def refused(data: bytes) -> str:
    with pytest.raises(CheckpointError) as caught:
        play(data)
    return str(caught.value)


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values(protocol: int) -> None:
    shared = [1, "two"]
    value = {
        "numbers": [0, 1, -1, 255, 256, 65536, -(2**31), 2**31, 10**30, -(10**30), 1.5, -0.0],
        "texts": ["", "a", "ä" * 300, "🙂", "line\nbreak"],
        "others": (None, True, False, (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [], {}),
        "shared": [shared, shared],
        7: "seven",
        None: "none",
    }
    assert play(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("size", [0, 3, 300, 70_000])
def test_bytes_stay_where_they_are(size: int) -> None:
    data = pickle.dumps({"a": b"x" * size}, 4)
    found = play(data)
    assert isinstance(found, dict) and isinstance(found["a"], FileBytes)
    assert data[found["a"].start : found["a"].start + found["a"].length] == b"x" * size


@pytest.mark.parametrize("value", [print, io.BytesIO, {1, 2}, frozenset([1]), complex(1, 2), collections.Counter("ab")])
def test_what_is_not_allowed(value: object) -> None:
    for protocol in range(6):
        message = refused(pickle.dumps(value, protocol))
        assert "not part of a checkpoint" in message or "not allowed" in message


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "1 bytes are promised, 0 are left"),
        (b"\x80\x04", "are promised"),
        (b".", "pop from empty list|stack is empty"),
        (b"(.", "the stack is empty"),
        (b"Xxxxx.", "a text of 2,021,161,080 bytes"),
        (b"\x8e" + b"\xff" * 8 + b".", "bytes are promised"),
        (b"\x8d" + b"\xff" * 8 + b".", "a text of"),
        (b"]q\x00h\x01.", "1"),
        (b"j\xff\xff\xff\xff.", "4294967295"),
        (b"]r\xff\xff\xff\x7f.", None),
        (b"t.", "no mark|list index"),
        (b"K\x01K\x02R.", "no function"),
        (b"K\x01}b.", "no dictionary|is given a state"),
        (b"K\x01K\x02a.", "no list"),
        (b"}K\x01u.", "no mark|no dictionary"),
        (b"}(K\x01u.", "no dictionary"),
        (b"}K\x01K\x02sK\x01K\x02s.", "occurs twice"),
        (b"}(K\x01K\x02K\x01K\x03u.", "occurs twice"),
        (b"})K\x01s.", "key of a dictionary"),
        (b"\x82\x01.", "not known or not allowed"),
        (b"\x97.", "not known or not allowed"),
        (b"cos\nsystem\n(S'x'\ntR.", "os.system"),
        (b"ios\nsystem\n.", "not known or not allowed"),
        (b"c" + b"x" * 10_000, "a line does not end"),
        (b"I" + b"9" * 5000 + b"\n.", "line does not end|digit"),
        (b"K\x01Q.", "persistent id"),
        (b"Pabc\n.", "not known"),
        (b"\x93.", "pop from empty|empty"),
    ],
)
def test_damage(data: bytes, message: str | None) -> None:
    if message is None:
        assert play(data) == []
    else:
        with pytest.raises(CheckpointError, match=message):
            play(data)


def bomb_of_tuples() -> bytes:
    """A tuple of tuples 60 levels deep, each twice the one below, as a key: hashing it would take 2^60 steps."""
    return b"}" + b")q\x00" + b"0h\x00h\x00\x86q\x00" * 60 + b"0h\x00K\x01s."


def bomb_of_steps() -> bytes:
    return b"(" + b"]" * 6_000_000 + b"l."


@pytest.mark.parametrize("make", [bomb_of_tuples, bomb_of_steps])
def test_bombs(make: Callable[[], bytes]) -> None:
    message = refused(make())
    assert "key of a dictionary" in message or "more than 5,000,000 steps" in message


def test_deep_nesting() -> None:
    assert play(b"]" + b"]" * 100_000 + b"a" * 100_000 + b".") is not None
