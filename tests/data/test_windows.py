"""Conversations that are too long: what is kept, what is cut, and that the cut samples still are what generation
sees."""

from __future__ import annotations

import random

import pytest

from oarsmith.data.conversations import Conversation
from oarsmith.data.samples import ConversationEncoder, SampleOptions
from oarsmith.data.spans import SpanEncoder
from oarsmith.data.windows import (
    ANSWER_CUT,
    PROMPT_TOO_LONG,
    QUESTION_CUT,
    STEPS_DROPPED,
    TURNS_DROPPED,
    Fitter,
    Window,
)


def chat(*contents, system=None):
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": "assistant" if n % 2 else "user", "content": text} for n, text in enumerate(contents)]
    return Conversation(tuple(messages), where="rows:1")


def encode(conversation, tokenizer, max_length, **options):
    return ConversationEncoder(tokenizer, SampleOptions(max_length=max_length, **options)).encode(conversation)


def text_of(sample, tokenizer):
    return tokenizer.decode(sample.ids.tolist())


def test_oldest_turns_go_first_and_the_system_message_stays(template_tokenizer):
    tokenizer = template_tokenizer("ax_chatml")
    conversation = chat(*(f"text number {n}" for n in range(20)), system="Be brief.")
    (whole,) = encode(conversation, tokenizer, 2048).samples
    encoded = encode(conversation, tokenizer, len(whole) - 1)
    (sample,) = encoded.samples
    assert encoded.notes == {TURNS_DROPPED: 1}
    text = text_of(sample, tokenizer)
    assert "Be brief." in text and "number 0" not in text and "number 1<" not in text and "number 2<" in text
    assert text.endswith("number 19<|im_end|>")


def test_the_window_kept_is_the_longest_that_fits(template_tokenizer):
    """The doubling search against trying every window."""
    tokenizer = template_tokenizer("ax_chatml")
    encoder = SpanEncoder(tokenizer, {})
    rng = random.Random(3)
    for _ in range(25):
        num_turns = rng.randint(1, 12)
        conversation = chat(*("word " * rng.randint(1, 12) for _ in range(2 * num_turns)), system="s")
        trained = {n: 1.0 for n, message in enumerate(conversation.messages) if message["role"] == "assistant"}
        window = Window(conversation.messages, trained)
        max_length = rng.randint(120, 300)
        num_head, starts = window.turns()
        windows = [window.since(num_head, start) for start in starts]
        candidates = [encoder.encode_turns(w.messages, None, w.trained).spans[0].ids for w in windows]
        best = next(ids for ids in candidates if len(ids) <= max_length)
        fitted = Fitter(encoder, max_length=max_length, src_length=max_length // 2).fit(window, None)
        assert [span.ids for span in fitted.spans] == [best]


def test_a_very_long_conversation_is_searched_from_its_end(template_tokenizer):
    tokenizer = template_tokenizer("ax_chatml")
    conversation = chat(*(f"text number {n} " + "word " * 50 for n in range(400)))
    encoded = encode(conversation, tokenizer, 512)
    (sample,) = encoded.samples
    assert 256 < len(sample) <= 512 and encoded.notes[TURNS_DROPPED] > 150


def test_a_long_question_loses_its_beginning_and_the_template_stays_whole(tokenizer):
    question = " ".join(f"word{n}" for n in range(200))
    encoded = encode(chat(question, "short"), tokenizer, 200, src_length=128)
    (sample,) = encoded.samples
    assert encoded.notes == {QUESTION_CUT: 1} and len(sample) <= 200
    text = text_of(sample, tokenizer)
    assert "word199<|im_end|>\n<|im_start|>assistant\nshort<|im_end|>" in text and "word0 " not in text
    assert len(sample) > 180, "a short answer leaves the room to the question"


def test_a_long_answer_is_cut_without_an_end_of_turn(tokenizer):
    encoded = encode(chat("q", "word " * 300), tokenizer, 128)
    (sample,) = encoded.samples
    assert encoded.notes == {ANSWER_CUT: 1} and len(sample) == 128
    assert sample.weights[-1] == 1 and sample.ids[-1] not in tokenizer.stop_ids


def test_both_too_long(tokenizer):
    encoded = encode(chat("猫が好き。" * 300, "word " * 300), tokenizer, 200, src_length=90)
    (sample,) = encoded.samples
    assert encoded.notes == {QUESTION_CUT: 1, ANSWER_CUT: 1}
    assert len(sample) == 200 and 200 - sample.num_trained <= 90
    assert "�" not in tokenizer.decode(sample.ids[: 200 - sample.num_trained].tolist())


def test_a_system_message_that_leaves_no_room_drops_the_row(tokenizer):
    encoded = encode(chat("q", "a", system="rule " * 200), tokenizer, 64)
    assert encoded.samples == () and encoded.dropped.reason == PROMPT_TOO_LONG
    assert "limit" in encoded.dropped.detail


def test_a_turn_with_tool_calls_loses_its_later_steps(tokenizer):
    call = {"id": "call00000", "type": "function", "function": {"name": "find", "arguments": {}}}
    messages = (
        {"role": "user", "content": "find it"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "result " * 200},
        {"role": "assistant", "content": "done"},
    )
    encoded = encode(Conversation(messages, where="rows:1"), tokenizer, 128)
    (sample,) = encoded.samples
    assert encoded.notes == {STEPS_DROPPED: 1}
    assert text_of(sample, tokenizer).endswith("</tool_call><|im_end|>")


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3", "ax_mistral_v1", "gemma", "phi3"])
def test_every_limit_holds_and_something_is_always_trained(name, template_tokenizer):
    tokenizer = template_tokenizer(name)
    rng = random.Random(7)
    words = ["alpha", "再加3", "🎉", "\n", "def f():", "<|im_end|>", "  ", "x" * 40]
    for _ in range(30):
        turns = rng.randint(1, 5)
        contents = ["q " + " ".join(rng.choices(words, k=rng.choice([1, 5, 60]))) for _ in range(2 * turns)]
        max_length = rng.choice([64, 96, 200])
        encoded = encode(chat(*contents), tokenizer, max_length)
        assert encoded.dropped is None or encoded.dropped.reason == PROMPT_TOO_LONG, encoded.dropped
        for sample in encoded.samples:
            assert len(sample) <= max_length and sample.num_trained > 0
            assert sample.weights[0] == 0 and sample.weights[-1] > 0
