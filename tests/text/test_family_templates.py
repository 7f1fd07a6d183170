"""Built-in templates of families whose checkpoints carry none, against the ids their authors' chat code makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from oarsmith.data.spans import SpanEncoder
from oarsmith.errors import DataError
from oarsmith.text import ChatTemplate, Tokenizer, load_tokenizer
from remote_tokenizers import CASES, FIXTURES, directory

ROLES = ("user", "assistant")
HISTORY = [("Hi there", "Hello\nyou"), (" 再问 ", " fine. ")]
QUERY = "\nlast [gMASK] 问"


def turns(history: list[tuple[str, str]] | list[list[str]], query: str | None = None) -> list[dict[str, Any]]:
    messages = [{"role": role, "content": text} for pair in history for role, text in zip(ROLES, pair, strict=True)]
    return messages if query is None else [*messages, {"role": "user", "content": query}]


def prompt_ids(tokenizer: Tokenizer, messages: list[dict[str, Any]]) -> list[int]:
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == tokenizer.encode_chat(messages, add_generation_prompt=True)
    return ids


def token(tokenizer: Tokenizer, text: str) -> int:
    index = tokenizer.token_to_id(text)
    assert index is not None
    return index


def test_qwen_is_make_context() -> None:
    tokenizer = load_tokenizer(FIXTURES / "qwen1_tiktoken")
    rows = json.loads((FIXTURES / "qwen1_tiktoken" / "expected.json").read_text("utf-8"))["make_context"]
    assert len(rows) == 3
    for row in rows:
        messages = [{"role": "system", "content": row["system"]}, *turns(row["history"], row["query"])]
        assert tokenizer.apply_chat_template(messages, add_generation_prompt=True) == row["raw_text"]
        assert prompt_ids(tokenizer, messages) == row["context_tokens"]
    assert prompt_ids(tokenizer, turns([], "Hello")) == rows[0]["context_tokens"]  # the authors' default system text


def test_chatglm2_is_build_prompt() -> None:
    tokenizer = load_tokenizer(FIXTURES / "chatglm2_spm")
    rows = json.loads((FIXTURES / "chatglm2_spm" / "expected.json").read_text("utf-8"))["build_prompt"]
    assert len(rows) == 2
    for row in rows:
        messages = turns(row["history"], row["query"])
        assert tokenizer.apply_chat_template(messages, add_generation_prompt=True) == "[gMASK]sop" + row["prompt"]
        assert prompt_ids(tokenizer, messages) == row["ids"] == tokenizer.encode(row["prompt"])


def test_chatglm3_is_build_chat_input(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(directory("glm3", tmp_path))
    assert len(CASES["glm3"]["chat"]) == 4
    for messages, ids in CASES["glm3"]["chat"]:
        assert prompt_ids(tokenizer, messages) == ids
    # An answer as the model wrote it, with its empty line of metadata, is the same history.
    said, written = turns([("a", "b")], "c"), turns([("a", "\n b")], "c")
    assert prompt_ids(tokenizer, said) == prompt_ids(tokenizer, written)


def test_chatglm_is_chat(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(directory("glm1", tmp_path))
    end = [token(tokenizer, "[gMASK]"), token(tokenizer, "<sop>")]
    assert prompt_ids(tokenizer, turns([], QUERY)) == tokenizer.encode(QUERY)
    rounds = ("Hi there\n答：Hello\nyou\n", " 再问 \n答： fine. \n", "\nlast [gMASK] 问\n答：")
    text = "".join(f"[Round {number}]\n问：{said}" for number, said in enumerate(rounds))
    assert prompt_ids(tokenizer, turns(HISTORY, QUERY)) == [*tokenizer.encode(text, add_special_tokens=False), *end]


def test_baichuan_is_build_chat_input() -> None:
    tokenizer = load_tokenizer(FIXTURES / "baichuan2_spm")
    messages = [{"role": "system", "content": "Be brief."}, *turns(HISTORY, QUERY)]
    expected = tokenizer.encode("Be brief.")
    for message in messages[1:]:
        expected += [195 if message["role"] == "user" else 196, *tokenizer.encode(message["content"])]
    assert prompt_ids(tokenizer, messages) == [*expected, 196]


def test_baichuan_takes_role_ids_from_the_model(tmp_path: Path) -> None:
    directory("baichuan_flags", tmp_path)
    (tmp_path / "generation_config.json").write_text('{"user_token_id": 7, "assistant_token_id": 8}')
    ids = prompt_ids(load_tokenizer(tmp_path), turns([], "Hi"))
    assert (ids[0], ids[-1]) == (7, 8)


def test_internlm2_is_build_inputs(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(directory("m_internlm2", tmp_path))
    text = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert prompt_ids(tokenizer, [{"role": "system", "content": "S"}, *turns([], "Hi")]) == tokenizer.encode(text)
    (tmp_path / "plain").mkdir()
    assert load_tokenizer(directory("internlm2_min", tmp_path / "plain")).chat_template is None  # it lacks the tokens


def test_yuan2_prompt() -> None:
    template = ChatTemplate.builtin("yuan2")
    assert template.render(turns([], "q"), add_generation_prompt=True) == "q<sep>"
    assert template.render(turns([("q", "a")], "r"), add_generation_prompt=True) == "q<n>a<n>r<sep>"
    assert template.render(turns([("q", "a"), ("r", "b")])) == "q<n>a<n>r<sep>b<eod>"
    system = {"role": "system", "content": "S"}
    assert template.render([system, *turns([], "q")], add_generation_prompt=True) == "S\nq<sep>"


@pytest.mark.parametrize(
    ("case", "end", "num_samples"),
    [
        ("glm1", "<eop>", 2),
        ("glm2_additional", "</s>", 2),
        ("glm3", "</s>", 2),
        ("baichuan_min", "</s>", 2),
        ("qwen", "<|im_end|>", 1),
        ("m_internlm2", "<|im_end|>", 1),
    ],
)
def test_training_sees_what_inference_sees(case: str, end: str, num_samples: int, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(directory(case, tmp_path))
    encoder = SpanEncoder(tokenizer, {})
    messages = turns(HISTORY)
    found = encoder.encode_turns(messages, None, {1: 1.0, 3: 1.0})
    assert not found.refused and len(found.spans) == num_samples
    last = found.spans[-1]
    prompt = tokenizer.encode_chat(messages[:3], add_generation_prompt=True)
    assert last.ids[: len(prompt)] == prompt and last.weights[len(prompt) - 1] == 0.0
    answer = last.ids[len(prompt) :]
    assert answer[-1] == token(tokenizer, end) and answer[-1] in tokenizer.stop_ids
    assert last.weights[len(prompt) :] == [1.0] * len(answer) and last.eos_added == 0
    assert tokenizer.decode(answer[:-1]).strip() == "fine."
    if case == "glm1":  # a prefix model: all of the prompt, then [gMASK] <sop>, then the answer alone
        assert prompt[-2:] == [token(tokenizer, "[gMASK]"), token(tokenizer, "<sop>")]
        assert last.ids.count(prompt[-1]) == 1


@pytest.mark.parametrize("name", ["chatglm", "chatglm2", "yuan2"])
def test_roles_that_cannot_be_said_are_refused(name: str) -> None:
    for roles in (("user", "user"), ("assistant",), ("user", "system")):
        with pytest.raises(DataError, match="must alternate"):
            ChatTemplate.builtin(name).render([{"role": role, "content": "x"} for role in roles])


@pytest.mark.parametrize("name", ["qwen", "chatglm", "chatglm2", "internlm2", "yuan2", "baichuan"])
def test_tools_are_refused(name: str) -> None:
    with pytest.raises(DataError, match="Tools are not supported"):
        ChatTemplate.builtin(name).render(turns([], "x"), [{"type": "function"}], bos_token="<s>")
