"""Chat templates against transformers' renderings, and the errors a person gets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from oarsmith.errors import CheckpointError, DataError
from oarsmith.text import ChatTemplate
from oarsmith.text.chat import BUILTIN_TEMPLATES

FOLDER = Path(__file__).parents[1] / "fixtures" / "tokenizers" / "chat_render"
ROWS: list[dict[str, Any]] = json.loads((FOLDER / "expected.json").read_text("utf-8"))["chat"]
NAMES = sorted({row["template"] for row in ROWS})
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALL = {"id": "abcdef123", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL_TURNS = [
    {"role": "user", "content": "1+2?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "abcdef123", "content": "3"},
    {"role": "assistant", "content": "It is 3."},
]
TURNS = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]


def template(name: str) -> ChatTemplate:
    return ChatTemplate.from_jinja((FOLDER / "templates" / f"{name}.jinja").read_text("utf-8"))


@pytest.mark.parametrize("name", NAMES)
def test_renderings_equal_the_reference(name: str) -> None:
    rows = [row for row in ROWS if row["template"] == name]
    assert rows
    for row in rows:
        variables = {**SPECIAL, **row["template_kwargs"]}
        arguments = (row["messages"], row["tools"], row["add_generation_prompt"])
        if row.get("raises"):
            with pytest.raises(DataError) as caught:
                template(name).render(*arguments, **variables)
            assert row["error"] in str(caught.value)
        else:
            assert template(name).render(*arguments, **variables) == row["rendered"], row["name"]


@pytest.mark.parametrize("culprit", [0, 1, 2, 5, 6])
def test_error_names_the_message(culprit: int) -> None:
    messages = [{"role": ("user", "assistant")[i % 2], "content": str(i)} for i in range(7)]
    wrong = ("assistant", "user")[culprit % 2]
    messages[culprit]["role"] = wrong
    with pytest.raises(DataError, match=rf"message {culprit} \(role '{wrong}'\).*must alternate"):
        template("gemma").render(messages, **SPECIAL)


def test_wrong_values_name_the_message() -> None:
    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": 5}]
    with pytest.raises(DataError, match=r"message 1 \(role 'user'\).*cannot render.*TypeError"):
        ChatTemplate.builtin("chatml").render(messages)
    with pytest.raises(DataError, match="message 0 is a str, not an object"):
        ChatTemplate.builtin("chatml").render(["hello"])  # type: ignore[list-item]


def test_no_messages() -> None:
    with pytest.raises(DataError, match="no messages"):
        ChatTemplate.from_jinja("{{ messages[0]['role'] + 'x' }}").render([])


def test_syntax_error_names_the_line() -> None:
    with pytest.raises(CheckpointError, match=r"line 2: the chat template does not parse"):
        ChatTemplate.from_jinja("ok\n{% for %}")


# The others end only their last answer, or write no generation blocks: test_family_templates.py.
@pytest.mark.parametrize("name", ["chatml", "llama-3", "mistral", "gemma", "internlm2"])
def test_builtin_turns_are_prefixes(name: str) -> None:
    # Loss spans are found by rendering prefixes, so a longer conversation must begin with the shorter one.
    builtin = ChatTemplate.builtin(name)
    whole = builtin.render_with_spans(TURNS, **SPECIAL)
    for count in (1, 3):
        prompt = builtin.render(TURNS[:count], add_generation_prompt=True, **SPECIAL)
        answered = builtin.render(TURNS[: count + 1], **SPECIAL)
        assert answered.startswith(prompt)
        assert whole.text.startswith(answered)
    said = [whole.text[start:end] for start, end in whole.generated]
    assert [text.strip().startswith(word) for text, word in zip(said, ("two", "four"), strict=True)] == [True, True]


@pytest.mark.parametrize("name", ["chatml", "llama-3", "mistral"])
def test_builtin_tools(name: str) -> None:
    builtin = ChatTemplate.builtin(name)
    whole = builtin.render_with_spans(TOOL_TURNS, TOOLS, **SPECIAL)
    assert json.dumps(CALL["function"]["arguments"]) in whole.text  # type: ignore[index]
    assert '"name": "add"' in builtin.render(TOOL_TURNS[:1], TOOLS, **SPECIAL)
    assert "add" not in builtin.render(TOOL_TURNS[:1], **SPECIAL)
    assert len(whole.generated) == 2
    assert whole.text.startswith(builtin.render(TOOL_TURNS[:1], TOOLS, True, **SPECIAL))
    as_text = [dict(message) for message in TOOL_TURNS]
    as_text[1]["tool_calls"] = [{**CALL, "function": {"name": "add", "arguments": '{"a": 1}'}}]
    assert builtin.render(as_text, TOOLS, **SPECIAL) == whole.text


def test_builtin_gemma_refuses_what_it_cannot_say() -> None:
    gemma = ChatTemplate.builtin("gemma")
    with pytest.raises(DataError, match="Tools are not supported"):
        gemma.render(TURNS, TOOLS)
    with pytest.raises(DataError, match="System role not supported"):
        gemma.render([{"role": "system", "content": "x"}, *TURNS])


def test_builtin_equals_the_released_templates() -> None:
    for name, released in (("gemma", "gemma"), ("llama-3", "llama3"), ("chatml", "ax_chatml")):
        ours, theirs = ChatTemplate.builtin(name), template(released)
        for prompt in (False, True):
            assert ours.render(TURNS, None, prompt, **SPECIAL) == theirs.render(TURNS, None, prompt, **SPECIAL)


@pytest.mark.parametrize("name", BUILTIN_TEMPLATES)
def test_builtin_is_there(name: str) -> None:
    roles = {"user_token": "<u>", "assistant_token": "<a>"}
    text = ChatTemplate.builtin(name).render(TURNS[:3], add_generation_prompt=True, **SPECIAL, **roles)
    assert all(message["content"] in text for message in TURNS[:3])


def test_unknown_builtin_names_the_known_ones() -> None:
    with pytest.raises(CheckpointError, match=r"'vicuna'(.|\n)*chatml, llama-3, mistral, gemma"):
        ChatTemplate.builtin("vicuna")
