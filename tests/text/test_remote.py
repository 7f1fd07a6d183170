"""Tokenizer classes that are code in their checkpoint, against what that code gives (fixtures/tokenizers/remote)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from oarsmith.errors import CheckpointError
from oarsmith.text import StreamDecoder, Tokenizer, load_tokenizer
from remote_tokenizers import CASES, FIXTURES, directory

SPM = FIXTURES / "chatglm2_spm" / "tokenizer.model"


def streamed(tokenizer: Tokenizer, ids: list[int], skip: bool) -> str:
    decoder = StreamDecoder(tokenizer, skip)
    return "".join(map(decoder.push, ids)) + decoder.finish()


@pytest.mark.parametrize("name", CASES)
def test_ids_and_texts_are_the_authors(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    tokenizer = load_tokenizer(directory(name, tmp_path))
    assert tokenizer.vocab_size == case["vocab_size"]
    assert [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id] == case["bos_eos_pad"]
    for text, ids, bare_ids in case["texts"]:
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.encode(text, add_special_tokens=False) == bare_ids, text
    for ids, text, clean_text in case["ids"]:
        assert tokenizer.decode(ids) == text == streamed(tokenizer, ids, skip=False)
        assert tokenizer.decode(ids, skip_special_tokens=True) == clean_text == streamed(tokenizer, ids, skip=True)


@pytest.mark.parametrize("name", CASES)
def test_saving_gives_the_same_tokenizer(name: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    tokenizer = load_tokenizer(directory(name, tmp_path / "a"))
    tokenizer.save(tmp_path / "b")
    again = load_tokenizer(tmp_path / "b")
    assert again.fingerprint == tokenizer.fingerprint and again.stop_ids == tokenizer.stop_ids
    for text, ids, _ in CASES[name]["texts"][:10]:
        assert again.encode(text) == ids
    for file in [*CASES[name]["model"], *CASES[name]["files"]]:
        assert (tmp_path / "b" / file).read_bytes() == (tmp_path / "a" / file).read_bytes()


def test_ids_outside_the_vocabulary_give_nothing(tmp_path: Path) -> None:
    for name in CASES:
        (tmp_path / name).mkdir()
        tokenizer = load_tokenizer(directory(name, tmp_path / name))
        ids = tokenizer.encode("Hello", add_special_tokens=False)
        assert tokenizer.decode([*ids, 10**9, -7]) == tokenizer.decode(ids)
        assert tokenizer.id_to_token(10**9) is None and tokenizer.token_to_id("no such token") is None


def chatglm(path: Path, config: dict[str, Any], **files: str) -> Tokenizer:
    path.mkdir()
    shutil.copy(SPM, path)
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ChatGLMTokenizer", **config}))
    for name, content in files.items():
        (path / name.replace("__", ".")).write_text(content)
    return load_tokenizer(path)


def test_chatglm2_and_chatglm3_are_told_apart(tmp_path: Path) -> None:
    class_line = "class ChatGLMTokenizer(PreTrainedTokenizer): raise SystemExit('never run')\n"
    added = {"added_tokens_decoder": {"1606": {"content": "<|user|>"}, "1608": {"content": "<|observation|>"}}}
    found = {
        "by name": chatglm(tmp_path / "a", {"name_or_path": "someone/ChatGLM2-6B-sft"}),
        "by the model's name": chatglm(tmp_path / "b", {}, config__json='{"_name_or_path": "THUDM/chatglm3-6b"}'),
        "by its tokens": chatglm(tmp_path / "c", added),
        "by code without roles": chatglm(tmp_path / "d", {}, tokenization_chatglm__py=class_line),
        "by code with roles": chatglm(tmp_path / "e", {}, tokenization_chatglm__py=class_line + "'<|observation|>'"),
        "not at all": chatglm(tmp_path / "f", {}),
    }
    templates = {how: t.chat_template and t.chat_template.origin.split()[-1] for how, t in found.items()}
    assert list(templates.values()) == ["chatglm2", "chatglm3", "chatglm3", "chatglm2", "chatglm3", None]
    assert found["by name"].vocab_size == 1605 and found["not at all"].vocab_size == 1609
    # What was found out from other files is kept when the tokenizer alone is saved.
    for how, tokenizer in found.items():
        tokenizer.save(tmp_path / "saved")
        assert load_tokenizer(tmp_path / "saved").fingerprint == tokenizer.fingerprint, how
        shutil.rmtree(tmp_path / "saved")


def test_class_is_found_by_model_type_and_file(tmp_path: Path) -> None:
    shutil.copy(FIXTURES / "qwen1_tiktoken" / "qwen.tiktoken", tmp_path)
    assert load_tokenizer(tmp_path).vocab_size == 1308
    shutil.copy(SPM, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "internlm2"}')
    assert load_tokenizer(tmp_path).encode("Hi")[0] == 1  # InternLM2 puts <s> in front


def test_qwen_takes_eos_from_the_model(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "qwen1_tiktoken", tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text('{"chat_format": "raw", "eos_token_id": 1100}')
    assert load_tokenizer(tmp_path).eos_id == 1100


def test_yuan_is_loaded_as_its_authors_load_it(tmp_path: Path) -> None:
    shutil.copy(SPM, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"}')
    (tmp_path / "config.json").write_text('{"model_type": "yuan"}')
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("写<sep>好<eod>")
    assert ids[-1] == tokenizer.eos_id == tokenizer.token_to_id("<eod>")
    assert ids.count(tokenizer.token_to_id("<sep>")) == 1 and 1 not in ids  # no <s>
    assert tokenizer.token_to_id("<FIM_MIDDLE>") in tokenizer.special_ids
    tokenizer.save(tmp_path / "saved")  # without config.json, which says that this LlamaTokenizer is Yuan's
    assert load_tokenizer(tmp_path / "saved").encode("写<sep>好<eod>") == ids


@pytest.mark.parametrize("name", ["glm1", "qwen", "baichuan_min", "m_glm4"])
def test_missing_file_is_named(name: str, tmp_path: Path) -> None:
    file = next(iter(CASES[name]["model"]))
    (directory(name, tmp_path) / file).unlink()
    with pytest.raises(CheckpointError, match=rf"needs the file .*{file}"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["glm1", "glm3", "baichuan_min", "internlm2_min"])
@pytest.mark.parametrize("damage", ["truncated", "pointer", "not text"])
def test_damaged_model_is_refused(name: str, damage: str, tmp_path: Path) -> None:
    file = directory(name, tmp_path) / next(iter(CASES[name]["model"]))
    content = file.read_bytes()
    assert content.count("的".encode()) > 0
    file.write_bytes(
        {
            "truncated": content[: len(content) // 2],
            "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
            "not text": content.replace("的".encode(), b"\xff\xfe\xfd"),
        }[damage]
    )
    with pytest.raises(CheckpointError, match="sentencepiece cannot read"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("added_tokens_decoder", "<s>"),
        ("added_tokens_decoder", {"-5": {"content": "z"}}),
        ("added_tokens_decoder", {"99999999999999999999": {"content": "z"}}),
        ("added_tokens_decoder", {"5": {"content": 7}}),
        ("additional_special_tokens", 5),
        ("additional_special_tokens", [None]),
        ("bos_token", [1]),
        ("eos_token", "\ud800"),
    ],
)
def test_absurd_configs_are_refused(key: str, value: Any, tmp_path: Path) -> None:
    file = directory("baichuan_min", tmp_path) / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(CheckpointError, match=key):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(("name", "lead"), [("glm3", "\n"), ("glm1", ""), ("qwen", ""), ("baichuan_min", "")])
def test_only_chatglm3_writes_a_line_of_its_own_before_an_answer(name: str, lead: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(directory(name, tmp_path))
    prompt = tokenizer.encode_chat([{"role": "user", "content": "Hi"}], None, True)
    assert tokenizer.answer_lead(prompt) == lead
    assert tokenizer.answer_lead(prompt[:-1]) == tokenizer.answer_lead([]) == ""
