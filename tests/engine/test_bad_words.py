"""Words to token ids."""

import pytest

from made_tokenizers import byte_fallback
from oarsmith.engine import Sampling
from oarsmith.engine.bad_words import spell_bad_words
from oarsmith.errors import ConfigError
from oarsmith.text import load_tokenizer
from remote_tokenizers import FIXTURES


def test_a_text_is_spelled_with_and_without_a_space():
    tokenizer = load_tokenizer(FIXTURES / "qwen25_bpe_json")
    found = spell_bad_words(Sampling(bad_words=["function", " the end", [3, 4]]), tokenizer)
    assert [tokenizer.decode(ids) for ids in found[:-1]] == ["function", " function", " the end"]
    assert found[-1] == (3, 4)
    assert len(found[2]) > 1


def test_pieces_of_sentencepiece_have_their_space_anyway(tmp_path):
    tokenizer = byte_fallback(tmp_path)
    found = spell_bad_words(Sampling(bad_words=["ab"]), tokenizer)
    assert tuple(tokenizer.encode("ab", add_special_tokens=False)) in found


def test_ids_need_no_tokenizer():
    assert spell_bad_words(Sampling(bad_words=[[3, 4]]), None) == [(3, 4)]
    with pytest.raises(ConfigError, match="bad_words has the text 'x'"):
        spell_bad_words(Sampling(bad_words=["x"]), None)
