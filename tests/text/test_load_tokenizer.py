"""load_tokenizer against what the original tokenizers make of the same files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from oarsmith.errors import CheckpointError, DataError
from oarsmith.text import StreamDecoder, Tokenizer, load_tokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures" / "tokenizers"
REMOTE = ("baichuan2_spm", "chatglm2_spm", "qwen1_tiktoken")
CASES = ("gpt2_vocab_merges", "llama2_spm_legacy", "qwen25_bpe_json", *REMOTE)
VARIANTS: dict[str, Any] = json.loads((FIXTURES / "variants" / "expected.json").read_text("utf-8"))["variants"]


def streamed(tokenizer: Tokenizer, ids: list[int], skip: bool) -> str:
    decoder = StreamDecoder(tokenizer, skip)
    return "".join(map(decoder.push, ids)) + decoder.finish()


@pytest.mark.parametrize("case", CASES)
def test_ids_and_text_equal_the_reference(case: str) -> None:
    tokenizer = load_tokenizer(FIXTURES / case)
    expected = json.loads((FIXTURES / case / "expected.json").read_text("utf-8"))
    assert tokenizer.vocab_size == expected["vocab_size_with_added"]
    assert tokenizer.bos_id == expected["bos_token_id"]
    assert tokenizer.eos_id == expected["eos_token_id"]
    assert tokenizer.pad_id == expected["pad_token_id"]
    texts = [row["text"] for row in expected["texts"]]
    assert tokenizer.encode_batch(texts) == [row["ids"] for row in expected["texts"]]
    for row in expected["texts"]:
        assert tokenizer.encode(row["text"], add_special_tokens=False) == row["ids_no_special"]
        assert tokenizer.decode(row["ids"]) == row["decoded"]
        assert tokenizer.decode(row["ids"], skip_special_tokens=True) == row["decoded_skip_special"]


@pytest.mark.parametrize("case", ["llama2_spm_legacy", "qwen25_bpe_json"])
def test_conversations_equal_the_reference(case: str) -> None:
    tokenizer = load_tokenizer(FIXTURES / case)
    for row in json.loads((FIXTURES / case / "expected.json").read_text("utf-8"))["chat"]:
        arguments = (row["messages"], row["tools"], row["add_generation_prompt"])
        if row.get("raises"):
            with pytest.raises(DataError, match=r"message \d") as caught:
                tokenizer.apply_chat_template(*arguments)
            assert row["error"] in str(caught.value)
        else:
            assert tokenizer.apply_chat_template(*arguments, **row["template_kwargs"]) == row["rendered"]
            assert tokenizer.encode_chat(*arguments, **row["template_kwargs"]) == row["ids"]


def variant_directory(name: str, path: Path) -> Path:
    variant = VARIANTS[name]
    for file, source in variant["base"].items():
        shutil.copy(FIXTURES / source, path / file)
    for file, content in variant["files"].items():
        (path / file).write_text(json.dumps(content))
    if variant.get("tokenizer_json"):
        content = json.loads((path / "tokenizer.json").read_text("utf-8")) | variant["tokenizer_json"]
        (path / "tokenizer.json").write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("name", VARIANTS)
def test_settings_act_as_in_transformers(name: str, tmp_path: Path) -> None:
    variant = VARIANTS[name]
    tokenizer = load_tokenizer(variant_directory(name, tmp_path))
    found = (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    assert found == tuple(variant[key] for key in ("vocab_size", "bos_id", "eos_id", "pad_id"))
    for text, ids, bare_ids, _, _ in variant["texts"]:
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.encode(text, add_special_tokens=False) == bare_ids, text
    for ids, text, clean_text in [(row[1], *row[3:]) for row in variant["texts"]] + variant["ids"]:
        assert tokenizer.decode(ids) == text == streamed(tokenizer, ids, skip=False)
        assert tokenizer.decode(ids, skip_special_tokens=True) == clean_text == streamed(tokenizer, ids, skip=True)


def test_missing_things_are_named(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="this is a file, not a model directory"):
        load_tokenizer(tmp_path / "model.gguf")
    (tmp_path / "model.gguf").unlink()
    with pytest.raises(CheckpointError, match="there is no directory"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"looked for tokenizer\.json, tokenizer\.model, .*qwen\.tiktoken"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"found only vocab\.json"):
        load_tokenizer(tmp_path)


def test_unknown_class_names_the_known_ones(tmp_path: Path) -> None:
    shutil.copy(FIXTURES / "llama2_spm_legacy" / "tokenizer.model", tmp_path)
    config = {"tokenizer_class": "SomeTokenizer", "auto_map": {"AutoTokenizer": ["code.SomeTokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"'SomeTokenizer' is not known.*\n.*LlamaTokenizer and GemmaTokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", b'{"model": ', "not valid JSON"),
        ("tokenizer.json", b'{"model": {}}', "cannot read the file"),
        ("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\n", "sentencepiece cannot read"),
        ("tokenizer_config.json", b"[]", "holds a list"),
        ("chat_template.jinja", b"\xff\xfe", "not UTF-8"),
        ("chat_template.json", b'{"conversation": ["only one"]}', "exactly two texts"),
    ],
)
def test_damaged_files_are_named(file: str, content: bytes, message: str, tmp_path: Path) -> None:
    source = "llama2_spm_legacy" if file == "tokenizer.model" else "qwen25_bpe_json"
    shutil.copytree(FIXTURES / source, tmp_path, dirs_exist_ok=True)
    if file == "chat_template.json":
        (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert file in str(caught.value)


def test_config_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "qwen25_bpe_json", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))
    config["added_tokens_decoder"]["7"] = {"content": "<|im_start|>", "special": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"the id 7, tokenizer\.json makes it 1101"):
        load_tokenizer(tmp_path)


def test_merges_that_do_not_fit_name_the_line(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "gpt2_vocab_merges", tmp_path, dirs_exist_ok=True)
    with (tmp_path / "merges.txt").open("a") as file:
        file.write("zz qq\n")
    with pytest.raises(CheckpointError, match=r"merges\.txt:\d+: 'zz' is not in vocab\.json"):
        load_tokenizer(tmp_path)


def test_template_files_come_before_the_config(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "qwen25_bpe_json", tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text("default")
    folder = tmp_path / "additional_chat_templates"
    folder.mkdir()
    (folder / "tool_use.jinja").write_text("tools")
    tokenizer = load_tokenizer(tmp_path)
    message = [{"role": "user", "content": "x"}]
    assert tokenizer.apply_chat_template(message) == "default"
    assert tokenizer.apply_chat_template(message, tools=[{"name": "f"}]) == "tools"


def test_named_templates_in_the_config(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "qwen25_bpe_json", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))
    config["chat_template"] = [{"name": "tool_use", "template": "tools"}, {"name": "rag", "template": "documents"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.apply_chat_template([], tools=[]) == "tools"
    with pytest.raises(CheckpointError, match="none named 'default'"):
        tokenizer.apply_chat_template([])


def test_paddle_template_is_found(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "gpt2_vocab_merges", tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.json").write_text(json.dumps({"query": "Q: {{query}}\nA:"}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "why"}], None, True) == "Q: why\nA:"
