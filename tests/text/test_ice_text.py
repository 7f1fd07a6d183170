"""ChatGLM-6B's ice_text.model. The ids against the authors' are in test_remote.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from oarsmith.errors import CheckpointError
from oarsmith.text import Tokenizer, load_tokenizer

ICE = Path(__file__).parents[1] / "fixtures" / "tokenizers" / "chatglm_ice"


def load(path: Path, model: str = "ice_text.model", **config: Any) -> Tokenizer:
    shutil.copy(ICE / model, path / "ice_text.model")
    content = {"tokenizer_class": "ChatGLMTokenizer", "num_image_tokens": 0, **config}
    (path / "tokenizer_config.json").write_text(json.dumps(content))
    return load_tokenizer(path)


def test_prefix_and_control_ids_come_last(tmp_path: Path) -> None:
    tokenizer = load(tmp_path)
    gmask, sop = tokenizer.token_to_id("[gMASK]"), tokenizer.token_to_id("<sop>")
    assert tokenizer.encode("Hi") == [*tokenizer.encode("Hi", add_special_tokens=False), gmask, sop]
    assert (tokenizer.bos_id, tokenizer.eos_id) == (sop, tokenizer.token_to_id("<eop>"))
    assert tokenizer.stop_ids == (tokenizer.eos_id,)


@pytest.mark.parametrize("text", ["a\n\n  b\tc", " " * 200 + "x", "\n", "\t \t  ", "你好\n\n问：  "])
def test_white_space_survives(text: str, tmp_path: Path) -> None:
    tokenizer = load(tmp_path, clean_up_tokenization_spaces=False)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_first_release_gets_its_control_pieces(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "old").mkdir()
    new, old = load(tmp_path / "new"), load(tmp_path / "old", "first_release.model")
    for text in ("Hello\n\n  world", "emoji 😀 你好\t", "a<|blank_3|>b <sop>x"):
        assert new.encode(text) == old.encode(text)
    assert new.vocab_size == old.vocab_size and new.stop_ids == old.stop_ids


def test_image_tokens_move_the_ids(tmp_path: Path) -> None:
    plain = load(tmp_path).encode("Hi")
    moved = load(tmp_path, num_image_tokens=20000)
    assert moved.encode("Hi") == [index + 20000 for index in plain]
    assert moved.decode([5]) == "<image_5>"


@pytest.mark.parametrize("value", [-1, 10**15, "20000", None, True])
def test_absurd_offsets_are_refused(value: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="num_image_tokens"):
        load(tmp_path, num_image_tokens=value)


def test_foreign_special_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'<nowhere>' is not in the file"):
        load(tmp_path, pad_token="<nowhere>")
