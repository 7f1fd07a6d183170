"""Samples: what is trained, with which weight, and rows that give none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from oarsmith.data.conversations import to_conversation
from oarsmith.data.records import Record
from oarsmith.data.samples import SampleOptions, encode_conversation
from oarsmith.data.spans import NO_END_OF_TURN, NO_TEMPLATE_FOR_ROLES, NOT_SHOWN
from oarsmith.errors import ConfigError, DataError
from oarsmith.text import ChatTemplate

MASKS = json.loads((Path(__file__).parents[1] / "fixtures" / "data" / "generation_masks.json").read_text("utf-8"))


def encode(value, tokenizer, **options):
    return encode_conversation(to_conversation(Record(value, "rows:1")), tokenizer, SampleOptions(**options))


def said(sample, tokenizer):
    """The trained tokens of each stretch as text."""
    texts, run = [], []
    for token_id, weight in [*zip(sample.ids.tolist(), sample.weights.tolist(), strict=True), (0, 0.0)]:
        if weight:
            run.append(token_id)
        elif run:
            texts.append(tokenizer.decode(run))
            run = []
    return texts


@pytest.mark.parametrize("case", MASKS["cases"], ids=[f"{c['template']}-{c['name']}" for c in MASKS["cases"]])
def test_ids_and_mask_equal_transformers_generation_masks(case, template_tokenizer):
    """transformers marks what stands in the template's own generation blocks: a second opinion on the same question."""
    tokenizer = template_tokenizer(case["template"])
    encoded = encode({"messages": case["messages"]}, tokenizer)
    (sample,) = encoded.samples
    ids = sample.ids.tolist()
    assert ids == case["ids"][: len(ids)]
    trained = (sample.weights > 0).astype(int)
    # These templates' blocks also hold line breaks that no model has to say: the one after <|im_end|>, and in Qwen2.5's
    # the one that ends the generation prompt.
    newline = tokenizer.encode("\n", add_special_tokens=False)[0]
    assistant = tokenizer.encode("<|im_start|>assistant", add_special_tokens=False)
    expected = list(case["assistant_masks"])
    for at, token_id in enumerate(case["ids"]):
        header = case["ids"][max(at - len(assistant), 0) : at] == assistant
        if token_id == newline and (header or case["ids"][at - 1] == tokenizer.eos_id):
            expected[at] = 0
    assert trained.tolist() == expected[: len(ids)]
    assert not any(expected[len(ids) :])


def test_weights_follow_the_messages_and_the_first_token_has_none(tokenizer):
    row = {
        "messages": [
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "first", "weight": 0},
            {"role": "user", "content": "two"},
            {"role": "assistant", "content": "second", "weight": 0.25},
            {"role": "user", "content": "three"},
            {"role": "assistant", "content": "third"},
        ]
    }
    (sample,) = encode(row, tokenizer).samples
    assert said(sample, tokenizer) == ["second<|im_end|>", "third<|im_end|>"]
    assert sorted(set(sample.weights.tolist())) == [0.0, 0.25, 1.0]
    assert sample.ids.dtype == np.int32 and sample.weights.dtype == np.float32 and sample.weights[0] == 0
    with pytest.raises(DataError, match="message 1 has a weight"):
        encode(row, tokenizer, train_on="all")


def test_train_on(tokenizer):
    row = {"src": ["one", "two"], "tgt": ["first", "second"]}
    (every,) = encode(row, tokenizer).samples
    (last,) = encode(row, tokenizer, train_on="last").samples
    (everything,) = encode(row, tokenizer, train_on="all").samples
    assert said(every, tokenizer) == ["first<|im_end|>", "second<|im_end|>"]
    assert said(last, tokenizer) == ["second<|im_end|>"]
    assert everything.num_trained == len(everything) - 1
    assert every.ids.tolist() == last.ids.tolist() == everything.ids.tolist()


def test_without_a_template_src_and_tgt_are_joined_and_eos_ends_the_answer(plain_tokenizer):
    row = {"src": "Q: alpha\nA:", "tgt": " the first\n"}
    (sample,) = encode(row, plain_tokenizer).samples
    prompt = plain_tokenizer.encode(row["src"])
    assert sample.ids[: len(prompt)].tolist() == prompt
    assert said(sample, plain_tokenizer) == [" the first\n</s>"]
    assert encode({"src": "q", "tgt": "a", "context": {"system": "s"}}, plain_tokenizer).dropped.reason == (
        NO_TEMPLATE_FOR_ROLES
    )


def test_a_tokenizer_that_could_end_no_answer_is_refused(make_tokenizer):
    encoded = encode({"src": "q", "tgt": "a"}, make_tokenizer(None, eos=None))
    assert encoded.dropped.reason == NO_END_OF_TURN


def test_paddle_chat_template_with_a_rows_own_variables(plain_tokenizer):
    content = {
        "system": "{{system | 'Be kind.'}} in {{city}}\n",
        "conversation": ["User: {{user}}\nBot:", " {{bot}}</s>\n"],
        "query": "User: {{query}}\nBot:",
    }
    tokenizer = plain_tokenizer.with_chat_template(ChatTemplate.from_paddle(content))
    row = {"src": ["q1", "q2"], "tgt": ["a1", "a2"], "context": {"city": "Bern"}}
    (sample,) = encode(row, tokenizer).samples
    assert said(sample, tokenizer) == [" a1</s>", " a2</s>"]
    assert tokenizer.decode(sample.ids.tolist()) == ("Be kind. in Bern\nUser: q1\nBot: a1</s>\nUser: q2\nBot: a2</s>")


def test_tool_calls_are_trained_and_tool_results_are_not(tokenizer, template_tokenizer):
    tool = {"name": "search", "description": "d", "parameters": {"type": "object", "properties": {}}}
    row = {
        "conversations": [
            {"from": "human", "value": "find it"},
            {"from": "function_call", "value": '{"name": "search", "arguments": {"q": "it"}}'},
            {"from": "observation", "value": "found 42"},
            {"from": "gpt", "value": "Here: 42"},
        ],
        "tools": json.dumps([tool]),
    }
    (sample,) = encode(row, tokenizer).samples
    call, answer = said(sample, tokenizer)
    assert call.endswith("</tool_call><|im_end|>") and '{"name": "search", "arguments": {"q": "it"}}' in call
    assert answer == "Here: 42<|im_end|>"
    # A template without tools would train an empty answer in place of the call.
    dropped = encode(row, template_tokenizer("llama3")).dropped
    assert dropped.reason == NOT_SHOWN and "search" in dropped.detail
    thinking = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    thinking["messages"][1]["reasoning_content"] = "long thoughts"
    assert encode(thinking, template_tokenizer("llama3")).dropped.detail == "reasoning_content"
    assert "long thoughts" in said(encode(thinking, template_tokenizer("qwen3")).samples[0], tokenizer)[0]


@pytest.mark.parametrize(
    ("messages", "detail"),
    [
        ([("user", "q")], "no assistant message"),
        ([("user", "q"), ("assistant", " \n")], "empty answers not trained"),
        ([("assistant", "hello")], "assistant messages before any question not trained"),
        ([("system", "s")], "no assistant message"),
    ],
)
def test_rows_without_an_answer_are_dropped_with_a_reason(messages, detail, tokenizer):
    row = {"messages": [{"role": role, "content": content} for role, content in messages]}
    encoded = encode(row, tokenizer)
    assert encoded.samples == () and encoded.dropped.detail == detail


def test_what_follows_the_last_answer_is_left_out_and_noted(tokenizer):
    row = {"messages": [{"role": "assistant", "content": "hello"}, {"role": "user", "content": "q"}]}
    row["messages"] += [{"role": "assistant", "content": "a"}, {"role": "user", "content": "thanks"}]
    encoded = encode(row, tokenizer)
    (sample,) = encoded.samples
    assert said(sample, tokenizer) == ["a<|im_end|>"]
    assert tokenizer.decode(sample.ids.tolist()).endswith("a<|im_end|>")
    assert set(encoded.notes.values()) == {1} and len(encoded.notes) == 2


def test_documents_are_trained_everywhere_and_pieces_overlap_by_one_token(plain_tokenizer):
    text = "The quick brown fox jumps over the lazy dog. " * 10
    (whole,) = encode({"text": text}, plain_tokenizer).samples
    assert whole.ids[-1] == plain_tokenizer.eos_id and whole.num_trained == len(whole) - 1
    encoded = encode({"text": text}, plain_tokenizer, max_length=16)
    assert max(map(len, encoded.samples)) == 16 and len(encoded.notes) == 1
    assert sum(sample.num_trained for sample in encoded.samples) == whole.num_trained
    rejoined = [*encoded.samples[0].ids[:1].tolist()]
    for sample in encoded.samples:
        assert sample.ids[0] == rejoined[-1]
        rejoined += sample.ids[1:].tolist()
    assert rejoined == whole.ids.tolist()
    assert encode({"text": "  "}, plain_tokenizer).dropped.reason == "empty document"


@pytest.mark.parametrize(
    "bad", [{"max_length": 1}, {"max_length": 8, "src_length": 8}, {"src_length": 0}, {"max_dropped_fraction": 2}]
)
def test_impossible_options_are_refused(bad):
    with pytest.raises(ConfigError):
        SampleOptions(**bad)
