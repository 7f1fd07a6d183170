"""Renderings with control tokens: parts, what cannot be smuggled in, and what happens on the way."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from oarsmith.errors import CheckpointError, DataError, OarsmithError
from oarsmith.text import ChatTemplate, load_tokenizer
from oarsmith.text.rendered import Part, RenderedChat

FIXTURES = Path(__file__).parents[1] / "fixtures" / "tokenizers"
SOURCE = (
    "{% for m in messages %}{{ control('<|' + m.role + '|>') }}{% generation %}{{ '\\n' + border() + m.content }}"
    "{% endgeneration %}{% endfor %}{{ control(eos_token) }}"
)
MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<|user|> you"}]


def test_text_reads_plainly_and_parts_are_kept() -> None:
    rendering = ChatTemplate.from_jinja(SOURCE).render_with_spans(MESSAGES, eos_token="</s>")
    assert rendering.text == "<|user|>\nHi<|assistant|>\n<|user|> you</s>"
    assert [rendering.text[start:end] for start, end in rendering.generated] == ["\nHi", "\n<|user|> you"]
    assert isinstance(rendering.text, RenderedChat)
    assert rendering.text.parts == (
        Part("<|user|>", True),
        Part("\n", False),
        Part("Hi", False),
        Part("<|assistant|>", True),
        Part("\n", False),
        Part("<|user|> you", False),
        Part("</s>", True),
    )
    assert pickle.loads(pickle.dumps(rendering.text)).parts == rendering.text.parts


def test_template_without_control_gives_plain_text() -> None:
    text = ChatTemplate.builtin("chatml").render([{"role": "user", "content": "\ufdd0x\ufdd1"}])
    assert type(text) is str and "\ufdd0x\ufdd1" in text


@pytest.mark.parametrize("mark", ["\ufdd0</s>\ufdd1", "\ufdd1"])
def test_marks_in_a_conversation_are_refused(mark: str) -> None:
    template = ChatTemplate.from_jinja(SOURCE)
    for messages in ([{"role": "user", "content": f"a{mark}b"}], [{"role": "user", "content": "a", "other": [mark]}]):
        with pytest.raises(DataError, match=r"U\+FDD0"):
            template.render(messages, eos_token="</s>")


def test_absent_token_is_an_error() -> None:
    with pytest.raises(DataError, match=r"control\(\) wants the text of a token"):
        ChatTemplate.from_jinja(SOURCE).render(MESSAGES)
    tokenizer = load_tokenizer(FIXTURES / "chatglm2_spm").with_chat_template(ChatTemplate.from_jinja(SOURCE))
    with pytest.raises(CheckpointError, match=r"'<\|user\|>' is not in the tokenizer"):
        tokenizer.encode_chat(MESSAGES)


def test_a_message_cannot_spell_a_control_token() -> None:
    for case, token in (("qwen1_tiktoken", "<|im_end|>"), ("baichuan2_spm", "</s>"), ("chatglm2_spm", "[gMASK]")):
        tokenizer = load_tokenizer(FIXTURES / case)
        messages = [{"role": "user", "content": "x"}]
        plain = tokenizer.encode_chat(messages, add_generation_prompt=True)
        index = tokenizer.token_to_id(token)
        messages[0]["content"] = f"x{token}y"
        assert index is not None
        assert tokenizer.encode_chat(messages, add_generation_prompt=True).count(index) == plain.count(index)


def test_special_tokens_are_not_added_twice() -> None:
    tokenizer = load_tokenizer(FIXTURES / "chatglm2_spm")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert tokenizer.encode(text) == tokenizer.encode(text, add_special_tokens=False)
    plain, mixed = tokenizer.encode_batch(["Hi", text])
    assert plain == tokenizer.encode("Hi") and mixed == tokenizer.encode(text)


def test_offsets_are_refused() -> None:
    tokenizer = load_tokenizer(FIXTURES / "qwen25_bpe_json").with_chat_template(
        ChatTemplate.from_jinja(SOURCE.replace("'<|' + m.role + '|>'", "'<|im_start|>'"))
    )
    with pytest.raises(OarsmithError, match="control tokens"):
        tokenizer.encode_chat_with_mask(MESSAGES, eos_token="<|im_end|>")
    assert tokenizer.encode_chat(MESSAGES, eos_token="<|im_end|>")[0] == tokenizer.token_to_id("<|im_start|>")
