"""StreamDecoder: the pieces joined are the text of all ids, and complete text comes at once."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from made_tokenizers import byte_fallback
from oarsmith.text import StreamDecoder, Tokenizer, load_tokenizer
from oarsmith.text.cleanup import clean_up_spaces, settled_length

FIXTURES = Path(__file__).parents[1] / "fixtures" / "tokenizers"


def cleaning(path: Path) -> Tokenizer:
    shutil.copytree(FIXTURES / "qwen25_bpe_json", path, dirs_exist_ok=True)
    config = json.loads((path / "tokenizer_config.json").read_text("utf-8"))
    (path / "tokenizer_config.json").write_text(json.dumps({**config, "clean_up_tokenization_spaces": True}))
    return load_tokenizer(path)


@pytest.mark.parametrize("case", ["gpt2_vocab_merges", "llama2_spm_legacy", "qwen25_bpe_json", "bytes", "cleaning"])
@pytest.mark.parametrize("skip", [False, True])
def test_joined_pieces_are_the_whole_text(case: str, skip: bool, tmp_path: Path) -> None:
    made = {"bytes": byte_fallback, "cleaning": cleaning}
    tokenizer = made[case](tmp_path) if case in made else load_tokenizer(FIXTURES / case)
    rng = random.Random(0)
    common = tokenizer.encode("It 's a b . Do n't , ' x 中文😀 you 've", add_special_tokens=False)
    decoder = StreamDecoder(tokenizer, skip)
    for length in (1, 2, 7, 60, 150, 151):
        for _ in range(15):
            ids = [rng.choice((rng.choice(common), rng.randrange(tokenizer.vocab_size))) for _ in range(length)]
            pieces = [decoder.push(i) for i in ids]
            assert "".join(pieces) + decoder.finish() == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("case", ["gpt2_vocab_merges", "llama2_spm_legacy", "qwen25_bpe_json"])
def test_complete_text_comes_at_once(case: str) -> None:
    tokenizer = load_tokenizer(FIXTURES / case)
    text = "Hello 中文 😀 world, " * 20
    decoder = StreamDecoder(tokenizer)
    ids = tokenizer.encode(text, add_special_tokens=False)
    seen = ""
    for i, token in enumerate(ids, start=1):
        piece = decoder.push(token)
        assert "\ufffd" not in piece
        seen += piece
        assert seen == tokenizer.decode(ids[:i], skip_special_tokens=True).rstrip("\ufffd")
    assert decoder.finish() == ""


def test_broken_bytes_come_with_finish() -> None:
    tokenizer = load_tokenizer(FIXTURES / "qwen25_bpe_json")
    half = tokenizer.encode("😀", add_special_tokens=False)[:2]
    decoder = StreamDecoder(tokenizer)
    assert [decoder.push(i) for i in half] == ["", ""]
    assert decoder.finish() == tokenizer.decode(half) != ""


def test_settled_prefixes_stay_as_they_are() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        text = "".join(rng.choice(" .,'?nntsmvre  a") for _ in range(rng.randrange(12)))
        for cut in range(len(text) + 1):
            end = settled_length(text[:cut])
            assert clean_up_spaces(text[:end]) + clean_up_spaces(text[end:]) == clean_up_spaces(text)
