"""PaddleNLP's chat_template.json."""

from __future__ import annotations

from typing import Any

import pytest

from oarsmith.errors import CheckpointError, DataError
from oarsmith.text import ChatTemplate

QWEN = {
    "system": "<|im_start|>system\n{{system | 'You are a helpful assistant.'}}<|im_end|>\n",
    "conversation": ["<|im_start|>user\n{{user}}<|im_end|>\n<|im_start|>assistant\n", "{{bot}}<|im_end|>\n"],
    "query": "<|im_start|>user\n{{query}}<|im_end|>\n<|im_start|>assistant\n",
}
TURNS = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
]
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
FIRST = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
LAST = "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"


def test_conversation_with_default_system() -> None:
    template = ChatTemplate.from_paddle(QWEN)
    assert template.render(TURNS, add_generation_prompt=True) == SYSTEM + FIRST + LAST
    assert template.render(TURNS[:2]) == SYSTEM + FIRST


def test_system_message_and_context() -> None:
    template = ChatTemplate.from_paddle(QWEN)
    expected = SYSTEM.replace("You are a helpful assistant.", "Be brief.") + FIRST
    assert template.render([{"role": "system", "content": "Be brief."}, *TURNS[:2]]) == expected
    assert template.render(TURNS[:2], system="Be brief.") == expected


def test_spans_are_the_bot_parts() -> None:
    rendering = ChatTemplate.from_paddle(QWEN).render_with_spans(TURNS[:2])
    assert [rendering.text[start:end] for start, end in rendering.generated] == ["b<|im_end|>\n"]


def test_variables_of_a_turn() -> None:
    content = {
        "conversation": [
            "[Round {{index}}{{' last' if is_last}}{{' of ' ~ length if is_training}}]{{user}}\n",
            "{{bot}}\n\n",
        ],
        "query": "[Round {{index}}]{{query}}\n",
    }
    template = ChatTemplate.from_paddle(content)
    assert template.render(TURNS, add_generation_prompt=True) == "[Round 0]a\nb\n\n[Round 1]c\n"
    # In training the last question is the first half of a turn, not a query.
    trained = "[Round 0 of 2]a\nb\n\n[Round 1 last of 2]c\n"
    assert template.render(TURNS, add_generation_prompt=True, is_training=True) == trained


def test_parts_may_be_missing() -> None:
    assert ChatTemplate.from_paddle({}).render(TURNS[:1], add_generation_prompt=True) == "a"
    with pytest.raises(DataError, match="no 'conversation' part"):
        ChatTemplate.from_paddle({"query": "{{query}}"}).render(TURNS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"chat": "x"}, "unexpected chat"),
        ({"query": 3}, "type of query"),
        ({"system": ["x"]}, "'system' must be a text"),
        ({"conversation": "x"}, "exactly two texts"),
        ({"conversation": ["x", 3]}, "exactly two texts"),
        ({"query": "{{ query"}, "does not parse"),
    ],
)
def test_wrong_shapes_are_named(content: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        ChatTemplate.from_paddle(content)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([TURNS[0], TURNS[0]], "message 1 has role 'user' where 'assistant' is expected"),
        ([TURNS[1]], "message 0 has role 'assistant'"),
        ([TURNS[0], {"role": "system", "content": "x"}], "message 1 has role 'system'"),
        ([{"role": "user", "content": None}], "content of message 0 is not a text"),
    ],
)
def test_other_roles_are_refused(messages: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        ChatTemplate.from_paddle(QWEN).render(messages)


def test_tools_are_refused() -> None:
    with pytest.raises(DataError, match="cannot describe tools"):
        ChatTemplate.from_paddle(QWEN).render(TURNS, [{"name": "f"}])
