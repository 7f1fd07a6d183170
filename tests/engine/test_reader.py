"""Text in pieces: nothing of a stop text, nothing of half a character, nothing lost."""

import itertools
import random
from pathlib import Path

import pytest

import oarsmith
from oarsmith.engine.reader import StopFilter, TextReader, without_lead

TOKENIZER = Path(__file__).parents[1] / "fixtures" / "tokenizers" / "qwen25_bpe_json"


def cut(text, stops):
    """What remains of a text, the plain way: the stop text that is complete first ends it."""
    for end in range(len(text) + 1):
        found = [at for stop in stops if (at := text[:end].find(stop)) >= 0]
        if found:
            return text[: min(found)], True
    return text, False


@pytest.mark.parametrize("stops", [("ab",), ("aab", "b"), ("abab", "ba"), ("aaa",), ("c", "abca")])
def test_every_short_text_in_single_letters(stops):
    for letters in itertools.product("abc", repeat=6):
        text, filtered, given = "".join(letters), StopFilter(stops), ""
        expected, stopped = cut(text, stops)
        for letter in text:
            given += filtered.push(letter)
            assert expected.startswith(given)
        given += filtered.finish()
        assert (given, filtered.stopped) == (expected, stopped)


def test_pieces_of_any_size_never_show_a_stop_text():
    choose = random.Random(4)
    for _ in range(500):
        text = "".join(choose.choice("abcd") for _ in range(30))
        filtered, given, at = StopFilter(("abc", "dd")), "", 0
        while at < len(text):
            size = choose.randint(1, 5)
            given += filtered.push(text[at : at + size])
            at += size
        given += filtered.finish()
        assert "abc" not in given
        assert "dd" not in given
        assert text.startswith(given)
        assert filtered.stopped == ("abc" in text or "dd" in text)


def test_what_could_only_begin_a_stop_text_comes_at_the_end():
    filtered = StopFilter(("</answer>",))
    assert filtered.push("x </ans") == "x "
    assert filtered.push("we") == ""
    assert filtered.push("t") == "</answet"
    assert filtered.push("<") == ""
    assert filtered.finish() == "<"


@pytest.mark.parametrize("text", ["héllo 🦊🦊 日本語 and 👩‍🚀!", "🦊", "plain"])
def test_pieces_are_whole_characters_and_join_to_the_text(text):
    tokenizer = oarsmith.load_tokenizer(TOKENIZER)
    reader, pieces = TextReader(tokenizer, ()), []
    for index in tokenizer.encode(text):
        reader.push(index)
        pieces.append(reader.take())
        assert "\ufffd" not in pieces[-1]
    reader.finish()
    assert "".join(pieces) + reader.take() == text == reader.text


def test_a_character_cut_off_by_the_limit_is_shown_as_such():
    tokenizer = oarsmith.load_tokenizer(TOKENIZER)
    ids = tokenizer.encode("a🦊")[:-1]
    reader = TextReader(tokenizer, ("never",))
    for index in ids:
        reader.push(index)
    assert reader.take() == "a"
    reader.finish()
    assert reader.text == tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\n 42", "42"),
        ("\n\n  a\n b", "a\n b"),
        ("\n", ""),
        ("42\n 3", "42\n 3"),
        ("tool\n x", "tool\n x"),
        (" \nx", " \nx"),
    ],
)
def test_a_lead_is_not_shown(text, shown):
    tokenizer = oarsmith.load_tokenizer(TOKENIZER)
    reader, pieces = TextReader(tokenizer, (), "\n"), []
    for token in tokenizer.encode(text):
        reader.push(token)
        pieces.append(reader.take())
    reader.finish()
    assert "".join([*pieces, reader.take()]) == reader.text == without_lead(text, "\n") == shown
