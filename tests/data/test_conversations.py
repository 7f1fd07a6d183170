"""Every dataset format, in its usual and its broken shapes."""

from __future__ import annotations

import json
import math

import pytest

from oarsmith.data.conversations import detect_format, to_conversation
from oarsmith.data.records import Record
from oarsmith.errors import DataError

SEARCH = {"name": "search_recipes", "description": "Find recipes", "parameters": {"type": "object", "properties": {}}}


def read(value, dataset_format=None):
    return to_conversation(Record(value, "rows.jsonl:7"), dataset_format)


def turns(conversation):
    return [(message["role"], message["content"]) for message in conversation.messages]


def test_src_tgt_as_strings_lists_and_with_a_system_text():
    assert turns(read({"src": "q", "tgt": "a"})) == [("user", "q"), ("assistant", "a")]
    many = read({"src": ["q1", "q2"], "tgt": ["a1", "a2"], "context": {"system": "s", "city": "Bern", "none": None}})
    assert turns(many) == [("system", "s"), ("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")]
    assert many.context == {"city": "Bern"}


def test_alpaca():
    row = {"instruction": "Sum", "input": "1 2", "output": "3", "history": [["hi", "hello"]], "system": "s"}
    assert turns(read(row)) == [
        ("system", "s"),
        ("user", "hi"),
        ("assistant", "hello"),
        ("user", "Sum\n1 2"),
        ("assistant", "3"),
    ]
    assert turns(read({"instruction": "Hi", "input": "", "output": "ok", "history": None})) == [
        ("user", "Hi"),
        ("assistant", "ok"),
    ]


def sharegpt_tools():
    call = {"name": "search_recipes", "arguments": {"ingredients": ["rice"]}}
    return {
        "conversations": [
            {"from": "human", "value": "I have rice."},
            {"from": "function_call", "value": json.dumps(call)},
            {"from": "observation", "value": '{"recipes": []}'},
            {"from": "gpt", "value": "Nothing found.", "weight": 0.5},
            {"from": "human", "value": "Both again"},
            {"from": "function_call", "value": json.dumps([call, call])},
            {"from": "observation", "value": "[]"},
            {"from": "gpt", "value": "Still nothing."},
        ],
        "tools": json.dumps([SEARCH]),
    }


def test_sharegpt_with_tools():
    conversation = read(sharegpt_tools())
    assert conversation.tools == ({"type": "function", "function": SEARCH},)
    assert [message["role"] for message in conversation.messages] == [
        "user", "assistant", "tool", "assistant", "user", "assistant", "tool", "assistant"
    ]  # fmt: skip
    call = conversation.messages[1]["tool_calls"][0]
    assert call == {
        "id": "call00000",
        "type": "function",
        "function": {"name": "search_recipes", "arguments": {"ingredients": ["rice"]}},
    }
    assert conversation.messages[2] == {
        "role": "tool", "content": '{"recipes": []}', "tool_call_id": "call00000", "name": "search_recipes"
    }  # fmt: skip
    assert [call["id"] for call in conversation.messages[5]["tool_calls"]] == ["call00001", "call00002"]
    assert conversation.messages[3]["weight"] == 0.5
    assert read({**sharegpt_tools(), "tools": ""}).tools is None


def test_openai_messages_with_tools_parts_and_nulls():
    row = {
        "messages": [
            {"role": "developer", "content": "s", "tool_calls": None},
            {"role": "user", "content": [{"type": "text", "text": "I have "}, {"type": "text", "text": "rice."}]},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "x1", "function": {"name": "search_recipes", "arguments": '{"n": 2}'}}],
            },
            {"role": "tool", "content": "[]", "tool_call_id": "x1"},
            {"role": "assistant", "content": "None.", "reasoning_content": "hm"},
        ],
        "tools": [{"type": "function", "function": SEARCH}],
    }
    conversation = read(row)
    assert turns(conversation)[:3] == [("system", "s"), ("user", "I have rice."), ("assistant", "")]
    assert conversation.messages[2]["tool_calls"][0]["function"]["arguments"] == {"n": 2}
    assert conversation.messages[4]["reasoning_content"] == "hm"
    assert "tool_calls" not in conversation.messages[0]
    assert turns(read({"conversations": [{"role": "user", "content": "q"}]})) == [("user", "q")]


def test_text_and_forced_formats():
    assert read({"text": "a document"}).document == "a document"
    assert read({"src": "a document"}, "text").document == "a document"
    both = {"text": "t", "instruction": "i", "output": "o"}
    assert detect_format(Record(both, "x:1")) == "alpaca" and read(both, "text").document == "t"
    with pytest.raises(DataError, match="unknown dataset_format 'sharegtp'"):
        read(both, "sharegtp")


BROKEN = [
    ({}, "fields (none) fit no known format"),
    ({"question": "q"}, "fields (question) fit no known format"),
    ({"src": "q"}, "'tgt' is null"),
    ({"src": None, "tgt": "a"}, "'src' is null"),
    ({"src": 3, "tgt": "a"}, "'src' is the number 3"),
    ({"src": ["q"], "tgt": []}, "'tgt' is an empty list"),
    ({"src": ["q", "r"], "tgt": ["a"]}, "'src' has 2 turns and 'tgt' 1"),
    ({"src": ["q", None], "tgt": ["a", "b"]}, "'src[1]' is null"),
    ({"src": "\ud83d", "tgt": "a"}, "half a character (\\ud83d) at position 0"),
    ({"src": "q", "tgt": "a", "context": "s"}, "'context' is the string 's'"),
    ({"src": "q", "tgt": "a", "context": {"messages": 1}}, "'context' sets messages"),
    ({"src": ["q"], "tgt": [], "response": ["a", "b"], "sort": [1, 0]}, "preference data"),
    ({"instruction": "i"}, "'output' is null"),
    ({"instruction": "i", "output": "o", "history": [["q"]]}, "'history[0]' is a list of 1"),
    ({"instruction": True, "output": "o"}, "'instruction' is true"),
    ({"conversations": []}, "'conversations' is an empty list"),
    ({"conversations": ["hi"]}, "'conversations[0]' is the string 'hi'"),
    ({"conversations": [{"from": "alien", "value": "x"}]}, "'conversations[0].from' is the string 'alien'"),
    ({"conversations": [{"from": "gpt", "value": None}]}, "'conversations[0].value' is null"),
    ({"conversations": [{"from": "function_call", "value": "search("}]}, "is not JSON"),
    ({"conversations": [{"from": "function_call", "value": "{}"}]}, "[0].name' is null"),
    ({"conversations": [{"from": "gpt", "value": "x", "weight": math.nan}]}, "weight' is the number nan"),
    ({"conversations": [{"from": "gpt", "value": "x", "weight": -1}]}, "weight' is the number -1"),
    ({"conversations": [{"from": "gpt", "value": "x", "weight": True}]}, "weight' is true"),
    ({"conversations": [{"from": "human", "value": "x"}], "tools": "{"}, "'tools' is not JSON"),
    ({"conversations": [{"from": "human", "value": "x"}], "tools": '{"a": 1}'}, "'tools' is an object with a"),
    ({"conversations": [{"from": "human", "value": "x"}], "tools": "[1]"}, "'tools[0]' is the number 1"),
    ({"messages": {"role": "user"}}, "'messages' is an object with role"),
    ({"messages": [{"content": "x"}]}, "'messages[0].role' is null"),
    ({"messages": [{"role": "assistant", "content": None}]}, "'messages[0].content' is null"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "stands in a user message"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "part of type 'image_url'"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}]},
        "arguments' is a list of 1",
    ),
    ({"text": None}, "'text' is null"),
    ({"text": ["a"]}, "'text' is a list of 1"),
]


@pytest.mark.parametrize(("value", "part"), BROKEN, ids=[part for _, part in BROKEN])
def test_broken_rows_name_place_field_and_shape(value, part):
    with pytest.raises(DataError) as caught:
        read(value)
    assert caught.value.where == "rows.jsonl:7"
    assert part in caught.value.what
    assert caught.value.fix
