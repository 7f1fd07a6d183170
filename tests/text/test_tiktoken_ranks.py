"""Rank files: Qwen-1's and GLM-4's. The ids themselves are in test_load_tokenizer.py and test_remote.py."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path

import pytest

from oarsmith.errors import CheckpointError, DataError
from oarsmith.text import load_tokenizer
from oarsmith.text.backends.tiktoken_ranks import read_ranks

QWEN = Path(__file__).parents[1] / "fixtures" / "tokenizers" / "qwen1_tiktoken"
BYTES = [f"{base64.b64encode(bytes([byte])).decode()} {byte}" for byte in range(256)]


def ranks_file(*lines: str) -> bytes:
    return "\n".join([*BYTES, *lines]).encode()


def test_a_sound_file() -> None:
    ranks = read_ranks(ranks_file("", "YWI= 256", "YWJj 257\r"), where="f")
    assert len(ranks) == 258 and ranks[b"abc"] == 257


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (ranks_file("YWI 256"), "not a line of a tiktoken file"),  # wrong padding
        (ranks_file("Y*I= 256"), "not a line of a tiktoken file"),
        (ranks_file("YWI="), "not two fields"),
        (ranks_file("YWI= 256 1"), "not two fields"),
        (ranks_file("YWI= -1"), "not two fields"),
        (ranks_file("YWI= 1e9"), "not two fields"),
        (ranks_file("YWI= " + "9" * 5000), "not two fields"),
        (ranks_file("YQ== 256"), r"token b'a' stands there twice"),
        (ranks_file("YWI= 255"), "are not 0 to 256, each once"),
        (ranks_file("YWI= 300"), "are not 0 to 256, each once"),
        ("\n".join(BYTES[:-1]).encode(), "no token for the byte 0xFF"),
        (b"", "no token for the byte 0x00"),
        (ranks_file(base64.b64encode(b"a" * 70_000).decode() + " 256"), "a token of 70000 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not a line of a tiktoken file"),
        (b"\x0a\x0e\x0a\x05<unk>\x15", "not a line of a tiktoken file"),
        (b"\xff\xfe\x00", "not a line of a tiktoken file"),
    ],
)
def test_damaged_files_are_refused(content: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read_ranks(content, where="qwen.tiktoken")
    assert str(caught.value).startswith("qwen.tiktoken")


def test_half_characters_and_endless_white_space_are_errors() -> None:
    tokenizer = load_tokenizer(QWEN)
    with pytest.raises(DataError, match=r"lone surrogate.*character 1"):
        tokenizer.encode("a\ud800")
    with pytest.raises(DataError, match="white space by the million"):
        tokenizer.encode(" " * 2_000_000 + "x")


def test_long_words_do_not_take_long() -> None:
    tokenizer = load_tokenizer(QWEN)
    text = "a" * 300_000 + "!" * 300_000
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_controls_of_glm4_must_fit_the_ranks(tmp_path: Path) -> None:
    shutil.copy(QWEN / "qwen.tiktoken", tmp_path / "tokenizer.model")
    config = {
        "tokenizer_class": "ChatGLM4Tokenizer",
        "added_tokens_decoder": {"12": {"content": "[gMASK]"}, "1101": {"content": "<sop>"}},
        "eos_token": "[gMASK]",
        "pad_token": "[gMASK]",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"'\[gMASK\]' the id 12, which is one of the 1,100 ranks"):
        load_tokenizer(tmp_path)
    config["added_tokens_decoder"] = {"1100": {"content": "[gMASK]"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="'<sop>' is not in added_tokens_decoder"):
        load_tokenizer(tmp_path)
