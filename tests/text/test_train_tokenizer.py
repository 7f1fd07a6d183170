"""A trained tokenizer: the same every time, lossless, and the same in transformers."""

import random

import pytest
import transformers

import oarsmith
from oarsmith import demo
from oarsmith.errors import DataError
from oarsmith.text.train_tokenizer import is_trained_with, train_tokenizer

TEXTS = [demo.unrelated_text(), demo.train_path().read_text(encoding="utf-8")]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def train(folder, special=SPECIAL, texts=TEXTS, size=700):
    train_tokenizer(texts, folder, vocab_size=size, special_tokens=special, facts={"size": size})
    return folder


def test_it_is_read_here_and_by_transformers(tmp_path):
    ours = oarsmith.load_tokenizer(train(tmp_path / "t"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "t")
    assert ours.vocab_size == len(theirs) == 700
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (0, 1, 2)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)
    randomly = random.Random(0)
    odd = ["", " ", "a  b\n\n\tc", "中文🙂é e\u0301", "1234567", "<s>x</s>"]
    odd += ["".join(chr(randomly.randrange(1, 0x2FFF)) for _ in range(50)) for _ in range(50)]
    for text in [*odd, *TEXTS]:
        ids = ours.encode(text)
        assert ids == theirs(text).input_ids and ids[0] == 0
        assert ours.decode(ids[1:]) == text


def test_training_again_gives_the_same_file(tmp_path):
    a, b = (train(tmp_path / name) / "tokenizer.json" for name in "ab")
    assert a.read_bytes() == b.read_bytes()


def test_without_bos_nothing_is_put_around_texts(tmp_path):
    tokenizer = oarsmith.load_tokenizer(train(tmp_path / "t", {"eos_token": "<|endoftext|>"}))
    assert tokenizer.encode("hello there") == tokenizer.encode("hello there", False)
    assert tokenizer.bos_id is None and tokenizer.eos_id == 0


def test_a_vocabulary_that_the_corpus_does_not_fill(tmp_path):
    with pytest.raises(DataError, match=r"gives only \d+ of 5,000") as caught:
        train(tmp_path / "t", texts=["a few words, a few words"], size=5000)
    assert "lower vocab_size" in caught.value.fix
    with pytest.raises(DataError, match="no room for 256 bytes and 3 special tokens"):
        train(tmp_path / "t", size=258)
    assert not (tmp_path / "t").exists()


def test_it_knows_what_it_was_trained_with(tmp_path):
    train(tmp_path / "t")
    assert is_trained_with(tmp_path / "t", {"size": 700})
    assert not is_trained_with(tmp_path / "t", {"size": 701})
    assert not is_trained_with(tmp_path, {"size": 700})
