"""The bytes of tokens: joined they are the text that was encoded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models

from made_tokenizers import byte_fallback
from oarsmith.errors import OarsmithError
from oarsmith.text import Tokenizer, load_tokenizer
from remote_tokenizers import CASES as REMOTE
from remote_tokenizers import FIXTURES, directory

CASES = [
    "baichuan2_spm",
    "chatglm2_spm",
    "gpt2_vocab_merges",
    "llama2_spm_legacy",
    "qwen1_tiktoken",
    "qwen25_bpe_json",
    "bytes",
    *REMOTE,
]
TEXTS = [
    "a b  ab",
    '{"name": "Ada Lovelace", "born": 1815,\n\t"works": [1.5e-3, null]}',
    "naïve café, 中文 and 😀😀 ¼",
    "tabs\tand\nlines\r\n  indented",
    "\x00\x01\x7f\u0080\u00ff",
]


def tokenizer_of(case: str, path: Path) -> Tokenizer:
    if case in REMOTE:
        return load_tokenizer(directory(case, path))
    return byte_fallback(path) if case == "bytes" else load_tokenizer(FIXTURES / case)


def joined(tokenizer: Tokenizer, ids: list[int]) -> bytes:
    return b"".join(tokenizer.token_bytes(index) or b"" for index in ids)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("case", CASES)
def test_joined_bytes_are_the_text(case: str, text: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(case, tmp_path)
    ids = tokenizer.encode(text, add_special_tokens=False)
    # sentencepiece puts a space in front; what it normalizes, decoding does not bring back either.
    expected = tokenizer.decode(ids)
    if "\ufffd" not in expected and not tokenizer.special_ids & set(ids):
        assert joined(tokenizer, ids).removeprefix(b" ").decode() == expected.removeprefix(" ")


@pytest.mark.parametrize("case", CASES)
def test_every_token_adds_its_bytes_after_others(case: str, tmp_path: Path) -> None:
    """Against decoding, for all tokens that are whole characters."""
    tokenizer = tokenizer_of(case, tmp_path)
    (anchor,) = tokenizer.encode("a", add_special_tokens=False)[-1:]
    before = tokenizer.decode([anchor, anchor])
    num_compared = 0
    for index in range(tokenizer.vocab_size):
        found, text = tokenizer.token_bytes(index), tokenizer.decode([anchor, anchor, index])
        if index in tokenizer.special_ids:
            assert found is None
        elif found is not None and index not in tokenizer.backend.added_ids and "\ufffd" not in text:
            assert found.decode() == text[len(before) :], index
            num_compared += 1
    assert num_compared > min(60, tokenizer.vocab_size // 2)
    assert tokenizer.token_bytes(tokenizer.vocab_size + 5) is None


def test_a_vocabulary_that_is_no_pieces_of_text_is_refused(tmp_path: Path) -> None:
    made = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    made.decoder = decoders.WordPiece()
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({}))
    with pytest.raises(OarsmithError, match=r"which bytes a token stands for \(decoder: WordPiece\)"):
        load_tokenizer(tmp_path).token_bytes(1)
