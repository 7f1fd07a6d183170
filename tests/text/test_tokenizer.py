"""What `Tokenizer` adds to its backends: stop ids, fingerprints, saving, masks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from oarsmith.errors import CheckpointError, DataError, OarsmithError
from oarsmith.text import ChatTemplate, Tokenizer, load_tokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures" / "tokenizers"
CASES = ("gpt2_vocab_merges", "llama2_spm_legacy", "qwen25_bpe_json")
TEXTS = ["Hello world", "  two  spaces ", "中文 😀", "<s> a </s>", "line\n<|im_end|>\n", ""]
TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.fixture
def qwen() -> Tokenizer:
    return load_tokenizer(FIXTURES / "qwen25_bpe_json")


@pytest.mark.parametrize("case", CASES)
def test_saved_tokenizer_is_the_same(case: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(FIXTURES / case)
    tokenizer.save(tmp_path / "out")
    again = load_tokenizer(tmp_path / "out")
    assert again.fingerprint == tokenizer.fingerprint
    assert again.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
    for file in (FIXTURES / case).iterdir():
        if file.name != "expected.json":
            assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    assert not list((tmp_path / "out").glob(".*")), "a temporary file was left"


@pytest.mark.parametrize("case", ["gpt2_vocab_merges", "qwen25_bpe_json"])
def test_transformers_reads_what_is_saved(case: str, tmp_path: Path) -> None:
    # No sentencepiece case: transformers 5 encodes those differently from 4.x and from sentencepiece itself.
    transformers = pytest.importorskip("transformers")
    tokenizer = load_tokenizer(FIXTURES / case).with_chat_template(ChatTemplate.builtin("chatml"))
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert [theirs.encode(text) for text in TEXTS] == tokenizer.encode_batch(TEXTS)
    assert theirs.apply_chat_template(TURNS, tokenize=False) == tokenizer.apply_chat_template(TURNS)
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_tokenizer(tmp_path / "theirs")
    assert again.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
    assert again.apply_chat_template(TURNS) == tokenizer.apply_chat_template(TURNS)


@pytest.mark.parametrize("kind", ["jinja", "named", "paddle", "none"])
def test_another_template_is_saved(kind: str, qwen: Tokenizer, tmp_path: Path) -> None:
    templates = {
        "jinja": ChatTemplate.builtin("gemma"),
        "named": ChatTemplate.from_jinja({"default": "d", "tool_use": "t"}),
        "paddle": ChatTemplate.from_paddle({"conversation": ["U{{user}}", "B{{bot}}"], "query": "U{{query}}"}),
        "none": None,
    }
    changed = qwen.with_chat_template(templates[kind])
    changed.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.fingerprint == changed.fingerprint != qwen.fingerprint
    if kind == "none":
        with pytest.raises(OarsmithError, match="has no chat template"):
            again.apply_chat_template(TURNS)
    else:
        assert again.apply_chat_template(TURNS) == changed.apply_chat_template(TURNS)


def test_fingerprint_does_not_depend_on_the_place(qwen: Tokenizer, tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "qwen25_bpe_json", tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").fingerprint == qwen.fingerprint
    assert load_tokenizer(FIXTURES / "gpt2_vocab_merges").fingerprint != qwen.fingerprint


def test_stop_ids_join_every_source(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "qwen25_bpe_json", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))
    config["eos_token"] = "<|endoftext|>"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    end, turn_end = 1100, 1102
    assert load_tokenizer(tmp_path).stop_ids == (end, turn_end), "eos, then the template's end of turn"
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [turn_end, 7]}))
    assert load_tokenizer(tmp_path).stop_ids == (turn_end, 7, end)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert load_tokenizer(tmp_path).stop_ids == (7, end, turn_end)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": "x"}))
    with pytest.raises(CheckpointError, match="eos_token_id is 'x'"):
        load_tokenizer(tmp_path)


def test_stop_ids_without_a_special_end_of_turn() -> None:
    tokenizer = load_tokenizer(FIXTURES / "llama2_spm_legacy")
    assert tokenizer.stop_ids == (2,)
    # The text after the answer is no token here, and a template that refuses the probe adds nothing.
    assert tokenizer.with_chat_template(ChatTemplate.builtin("chatml")).stop_ids == (2,)
    refusing = ChatTemplate.from_jinja("{{ raise_exception('no') }}")
    assert tokenizer.with_chat_template(refusing).stop_ids == (2,)


def test_tokens_and_ids(qwen: Tokenizer) -> None:
    assert qwen.token_to_id("<|im_end|>") == 1102
    assert qwen.id_to_token(1102) == "<|im_end|>"
    assert qwen.token_to_id("no such token") is None
    assert qwen.id_to_token(10**6) is None
    assert qwen.special_ids == {1100, 1101, 1102, 1103}, "<tool_call> is added, but not special"


@pytest.mark.parametrize("case", CASES)
def test_ids_outside_the_vocabulary_give_no_text(case: str) -> None:
    tokenizer = load_tokenizer(FIXTURES / case)
    ids = tokenizer.encode("Hello", add_special_tokens=False)
    assert tokenizer.decode([*ids, tokenizer.vocab_size + 5, -100]) == "Hello"
    assert tokenizer.decode([]) == ""
    assert tokenizer.encode_batch([]) == []


@pytest.mark.parametrize("case", CASES)
def test_lone_surrogate_is_named(case: str) -> None:
    with pytest.raises(DataError, match=r"lone surrogate, '\\ud83d', at character 3"):
        load_tokenizer(FIXTURES / case).encode("abc\ud83d")


def test_assistant_masks_equal_the_reference(qwen: Tokenizer) -> None:
    folder = FIXTURES / "chat_render"
    for row in json.loads((folder / "expected.json").read_text("utf-8"))["generation_masks"]:
        source = (folder / "templates" / f"{row['template']}.jinja").read_text("utf-8")
        tokenizer = qwen.with_chat_template(ChatTemplate.from_jinja(source))
        if row.get("raises"):
            with pytest.raises(DataError):
                tokenizer.encode_chat_with_mask(row["messages"], bos_token="<s>")
            continue
        ids, mask = tokenizer.encode_chat_with_mask(row["messages"], bos_token="<s>", eos_token="</s>")
        assert ids == row["ids"]
        assert [int(inside) for inside in mask] == row["assistant_masks"]


def test_unwritable_directory(qwen: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write the file"):
        qwen.save(tmp_path / "file")
