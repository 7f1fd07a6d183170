"""The invariants of loss spans, held over every published template of the fixtures."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from oarsmith.data.conversations import Conversation
from oarsmith.data.samples import ConversationEncoder, SampleOptions
from oarsmith.data.spans import PROMPT_NOT_A_PREFIX, REFUSED_BY_TEMPLATE

TEMPLATES = Path(__file__).parents[1] / "fixtures" / "tokenizers" / "chat_render" / "templates"
NAMES = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))
WITHOUT_SYSTEM = ("gemma", "gemma_training")
# Their generation prompt opens a thought that their training text of such an answer does not have.
PROMPT_CONTRADICTS = {"deepseekv3": ("single", "multi", "thinking"), "nemotron_3_nano": ("single", "multi")}

USER, ASSISTANT = "user", "assistant"
SINGLE = [(USER, "What is alpha?"), (ASSISTANT, "Alpha is the first.")]
MULTI = [
    *SINGLE,
    (USER, "And 再加3呢？😀 beta"),
    (ASSISTANT, "Beta: 第二 🎉"),
    (USER, "Then gamma\n"),
    (ASSISTANT, "def f():\n    return 3"),
]
THINKING = [
    (USER, "Add 2 and 2."),
    (ASSISTANT, "<think>\ntwo and two\n</think>\n\nFour."),
    (USER, "Add 3."),
    (ASSISTANT, "<think>\nfour and three\n</think>\n\nSeven."),
]
CONVERSATIONS = {"single": SINGLE, "multi": MULTI, "thinking": THINKING}


def conversation(turns, tools=None):
    return Conversation(tuple({"role": role, "content": content} for role, content in turns), tools, where="rows:1")


def trained_runs(sample):
    """[start, end) of the stretches of trained tokens."""
    at = 0
    for trained, run in itertools.groupby(sample.weights.tolist(), key=bool):
        length = len(list(run))
        if trained:
            yield at, at + length
        at += length


def check_against_inference(conv, encoded, tokenizer, **variables):
    """Each trained stretch begins exactly where generation begins, and ends with a control token."""
    messages = [dict(message) for message in conv.messages]
    found = []
    for sample in encoded.samples:
        ids = sample.ids.tolist()
        assert sample.weights[0] == 0
        for start, end in trained_runs(sample):
            answered = [
                index
                for index, message in enumerate(messages)
                if message["role"] == "assistant"
                and tokenizer.encode_chat(messages[:index], tools=conv.tools, add_generation_prompt=True, **variables)
                == ids[:start]
            ]
            assert len(answered) == 1, tokenizer.decode(ids[:start])
            found += answered
            said = tokenizer.decode(ids[start:end])
            last = tokenizer.decode([ids[end - 1]])
            assert said.endswith(last) and tokenizer.decode([ids[end - 1]], skip_special_tokens=True) == "", said
            answer = messages[answered[0]]["content"].split("</think>")[-1].strip()
            assert answer in said
            assert said.count(last) == 1, f"something is trained after the end of the turn: {said!r}"
            for message in messages:
                if message["role"] == "user":
                    assert message["content"].strip() not in said
    return sorted(found)


@pytest.mark.parametrize("kind", CONVERSATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_every_answer_is_trained_from_the_generation_prompt_to_its_end(name, kind, template_tokenizer):
    tokenizer = template_tokenizer(name)
    conv = conversation(CONVERSATIONS[kind])
    encoded = ConversationEncoder(tokenizer, SampleOptions()).encode(conv)
    if kind in PROMPT_CONTRADICTS.get(name, ()):
        assert encoded.samples == () and encoded.dropped.reason == PROMPT_NOT_A_PREFIX
        return
    assert encoded.dropped is None, encoded.dropped
    answers = [index for index, message in enumerate(conv.messages) if message["role"] == "assistant"]
    assert check_against_inference(conv, encoded, tokenizer) == answers


@pytest.mark.parametrize("name", NAMES)
def test_a_system_message_is_context_or_the_row_is_dropped_with_the_templates_words(name, template_tokenizer):
    tokenizer = template_tokenizer(name)
    conv = conversation([("system", "You are Zeta."), *SINGLE])
    encoded = ConversationEncoder(tokenizer, SampleOptions()).encode(conv)
    if name in WITHOUT_SYSTEM:
        assert encoded.dropped.reason == REFUSED_BY_TEMPLATE
        assert "System role not supported" in encoded.dropped.detail
        return
    if name in PROMPT_CONTRADICTS:
        assert encoded.dropped.reason == PROMPT_NOT_A_PREFIX
        return
    assert check_against_inference(conv, encoded, tokenizer) == [2]
    assert "You are Zeta." in tokenizer.decode(encoded.samples[0].ids.tolist())


@pytest.mark.parametrize("name", ["qwen2_5", "llama3", "ax_mistral_v1", "lfm2", "gemma"])
def test_templates_that_keep_history_give_one_sample(name, template_tokenizer):
    encoded = ConversationEncoder(template_tokenizer(name), SampleOptions()).encode(conversation(MULTI))
    assert len(encoded.samples) == 1 and not encoded.notes


def test_qwen3_rewrites_history_so_each_turn_gets_its_own_sample(template_tokenizer):
    tokenizer = template_tokenizer("qwen3")
    encoded = ConversationEncoder(tokenizer, SampleOptions()).encode(conversation(THINKING))
    assert len(encoded.samples) == 2
    assert any("their own sample" in note for note in encoded.notes)
    second = tokenizer.decode(encoded.samples[1].ids.tolist())
    assert "two and two" not in second and "four and three" in second


def test_what_the_prompt_supplies_is_not_trained(template_tokenizer):
    tokenizer = template_tokenizer("qwen3")
    options = SampleOptions(template_variables={"enable_thinking": False})
    conv = conversation(SINGLE)
    (sample,) = ConversationEncoder(tokenizer, options).encode(conv).samples
    trained = tokenizer.decode([i for i, w in zip(sample.ids.tolist(), sample.weights, strict=True) if w])
    assert trained == "Alpha is the first.<|im_end|>"
    assert "<think>" in tokenizer.decode(sample.ids.tolist())
    (sample,) = ConversationEncoder(tokenizer, SampleOptions()).encode(conv).samples
    trained = tokenizer.decode([i for i, w in zip(sample.ids.tolist(), sample.weights, strict=True) if w])
    assert trained == "<think>\n\n</think>\n\nAlpha is the first.<|im_end|>"


def test_a_prompt_that_the_training_text_contradicts_is_refused(make_tokenizer):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    tokenizer = make_tokenizer(template, eos="<|im_end|>")
    encoded = ConversationEncoder(tokenizer, SampleOptions()).encode(conversation(SINGLE))
    assert encoded.samples == () and encoded.dropped.reason == PROMPT_NOT_A_PREFIX
    assert "<think>" in encoded.dropped.detail
    thinking = conversation([(USER, "Add."), (ASSISTANT, "<think>\nhm\n</think>\nFour")])
    (sample,) = ConversationEncoder(tokenizer, SampleOptions()).encode(thinking).samples
    said = tokenizer.decode([i for i, w in zip(sample.ids.tolist(), sample.weights, strict=True) if w])
    assert said == "hm\n</think>\nFour<|im_end|>"


def test_tokens_that_merge_across_the_border_are_split_where_generation_splits(make_tokenizer):
    """A template that ends its prompt with a space, which is one token together with the answer's first word."""
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer = make_tokenizer(template)
    conv = conversation([(USER, "Go"), (ASSISTANT, "the way"), (USER, "On"), (ASSISTANT, " indeed")])
    whole = tokenizer.encode_chat(list(conv.messages[:2]))
    prompt = tokenizer.encode_chat(list(conv.messages[:1]), add_generation_prompt=True)
    assert whole[: len(prompt)] != prompt, "the example must merge across the border"
    encoded = ConversationEncoder(tokenizer, SampleOptions()).encode(conv)
    assert check_against_inference(conv, encoded, tokenizer) == [1, 3]
    assert tokenizer.decode(encoded.samples[0].ids.tolist()) == tokenizer.decode(whole)


def test_control_tokens_in_an_answer_do_not_end_the_loss_early(tokenizer):
    conv = conversation([(USER, "Say it"), (ASSISTANT, "The mark <|im_end|> ends a turn.")])
    (sample,) = ConversationEncoder(tokenizer, SampleOptions()).encode(conv).samples
    said = tokenizer.decode([i for i, w in zip(sample.ids.tolist(), sample.weights, strict=True) if w])
    assert said == "The mark <|im_end|> ends a turn.<|im_end|>"
