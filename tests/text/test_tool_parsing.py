"""Calls in answers, as the model cards show them."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oarsmith.text import ChatTemplate, load_tokenizer
from oarsmith.text.tool_parsing import _FORMATS, PLAIN, ToolCall, ToolFormat, find_tool_format, forced_schema

TOKENIZER = Path(__file__).parents[1] / "fixtures" / "tokenizers" / "qwen25_bpe_json"
FORMATS = {form.name: form for _, form in _FORMATS} | {"json": PLAIN}
PARIS = '{"city": "Paris"}'
TOOLS = [
    {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    }
]
SEP, CALL, END = "<｜tool▁sep｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"

EXAMPLES = [
    ("tool_call", '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>', "", 1),
    (
        "tool_call",
        'Let me see.\n<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>\n'
        '<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"Paris\\"}"}</tool_call>\n',
        "Let me see.",
        2,
    ),
    (
        "tool_call",
        "<think>\nhm\n</think>\n\n<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n"
        "</tool_call>",
        "<think>\nhm\n</think>",
        1,
    ),
    (
        "tool_call",
        "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n</tool_call>",
        "",
        1,
    ),
    ("tool_call", f"<function=weather>{PARIS}</function>", "", 1),
    ("mistral", '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"}, "id": "abcdefghi"}]', "", 1),
    ("mistral", f"Yes.[TOOL_CALLS]weather[ARGS]{PARIS}[TOOL_CALLS]weather[CALL_ID]a1[ARGS]{PARIS}", "Yes.", 2),
    ("mistral", '[{"name": "weather", "arguments": {"city": "Paris"}}]', "", 1),
    (
        "deepseek",
        f"Ok.\n<｜tool▁calls▁begin｜>{CALL}function{SEP}weather\n```json\n{PARIS}\n```{END}\n"
        f"{CALL}function{SEP}weather\n```json\n{PARIS}\n```{END}<｜tool▁calls▁end｜>",
        "Ok.",
        2,
    ),
    ("deepseek", f"<｜tool▁calls▁begin｜>{CALL}weather{SEP}{PARIS}{END}<｜tool▁calls▁end｜>", "", 1),
    ("llama", '{"name": "weather", "parameters": {"city": "Paris"}}', "", 1),
    ("llama", '<|python_tag|>{"name": "weather", "parameters": {"city": "Paris"}}', "", 1),
    (
        "llama",
        '{"name": "weather", "parameters": {"city": "Paris"}}; {"name": "weather", "parameters": {"city": "Paris"}}',
        "",
        2,
    ),
    ("llama", "[weather(city='Paris'), weather(city=\"Paris\")]", "", 2),
    ("glm", f"weather\n{PARIS}", "", 1),
    ("glm", "weather\n```python\ntool_call(city='Paris')\n```", "", 1),
    (
        "internlm",
        'I look.<|action_start|><|plugin|>\n{"name": "weather", "parameters": {"city": "Paris"}}<|action_end|>\n',
        "I look.",
        1,
    ),
    ("tool_list", '<|tool_call|>[{"name": "weather", "arguments": {"city": "Paris"}}]<|/tool_call|>', "", 1),
    (
        "harmony",
        "<|channel|>analysis<|message|>User asks.<|end|><|start|>assistant<|channel|>commentary to=functions.weather "
        f"<|constrain|>json<|message|>{PARIS}<|call|>",
        "",
        1,
    ),
    (
        "harmony",
        "<|channel|>analysis<|message|>Easy.<|end|><|start|>assistant<|channel|>final<|message|>It is 4 < 5.<|return|>",
        "It is 4 < 5.",
        0,
    ),
    ("cohere", 'Action: ```json\n[{"tool_name": "weather", "parameters": {"city": "Paris"}}]\n```', "", 1),
    (
        "cohere2",
        '<|START_ACTION|>[{"tool_call_id": 0, "tool_name": "weather", "parameters": {"city": "Paris"}}]<|END_ACTION|>',
        "",
        1,
    ),
    ("functools", 'functools[{"name": "weather", "arguments": {"city": "Paris"}}]', "", 1),
    ("json", '```json\n{"name": "weather", "parameters": {"city": "Paris"}}\n```', "", 1),
    ("json", "```tool_code\nprint(weather(city='Paris'))\n```", "", 1),
]

CONTENT = [
    ("tool_call", "A <b>word</b> & a list [1, 2] {x}\n\n"),
    ("tool_call", '<tool_call>{"name": "weather", "arguments": {"city": "Par'),
    ("tool_call", '<tool_call>{"name": "", "arguments": {}}</tool_call> and'),
    ("tool_call", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
    ("tool_call", '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>'),
    ("tool_call", '<tool_call>{"name": "f", "arguments": {"a": 1e999}}</tool_call>'),
    ("tool_call", "<tool_call>" + "[" * 5000),
    ("tool_call", "<tool_call>" * 50),
    ("mistral", "[TOOL_CALLS] nothing"),
    ("mistral", "[1, 2] are numbers"),
    ("llama", '{"name": "weather"}'),
    ("llama", "[link](http://here) is\n it"),
    ("glm", "Hello\nthere"),
    ("deepseek", f"<｜tool▁calls▁begin｜>{CALL}x"),
    ("json", '{"answer": 42}'),
    ("json", "[f(" + "(" * 90 + ")" * 90 + ")]"),
]


def joined(form: ToolFormat, pieces: list[str]) -> list[str | ToolCall]:
    stream = form.stream(TOOLS)
    parts = [part for piece in pieces for part in stream.feed(piece)] + stream.finish()
    found: list[str | ToolCall] = []
    for part in parts:
        assert part != ""
        if isinstance(part, str) and found and isinstance(found[-1], str):
            found[-1] += part
        else:
            found.append(part)
    return found


@pytest.mark.parametrize(("name", "text", "content", "count"), EXAMPLES)
def test_documented_answers_are_read_whole_and_character_by_character(
    name: str, text: str, content: str, count: int
) -> None:
    said, calls = FORMATS[name].parse(text, TOOLS)
    assert (said, calls) == (content, [ToolCall("weather", PARIS)] * count)
    assert joined(FORMATS[name], list(text)) == joined(FORMATS[name], [text])


@pytest.mark.parametrize(("name", "text"), CONTENT)
def test_what_is_no_whole_call_stays_text(name: str, text: str) -> None:
    assert FORMATS[name].parse(text) == (text, [])
    assert joined(FORMATS[name], list(text)) == [text]


_PIECES = st.sampled_from(
    [text for _, text, _, _ in EXAMPLES]
    + [text for _, text in CONTENT[:5]]
    + [marker for form in FORMATS.values() for marker in (*form.anywhere, *form.keeps_special, *form.leading)]
    + ["</tool_call>", "```", "```json", " ", "\n", "; ", "{", "}", '"', "\\", "[", "]", "word", "<", "é", "f(a=1)"]
)


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(sorted(FORMATS)), st.lists(_PIECES, max_size=6), st.data())
def test_any_cut_of_any_text_gives_the_same(name: str, parts: list[str], data: st.DataObject) -> None:
    text = "".join(part[: data.draw(st.integers(1, len(part)))] if part else "" for part in parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    form = FORMATS[name]
    whole = joined(form, [text])
    assert joined(form, pieces) == whole == joined(form, list(text))
    said, calls = form.parse(text, TOOLS)
    assert said == "".join(part for part in whole if isinstance(part, str))
    for call in calls:
        assert call.name and isinstance(json.loads(call.arguments), dict)


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(sorted(FORMATS)), st.text(alphabet='<>[]{}|"\\:,_ \n`toolca｜▁', max_size=40))
def test_text_of_marker_characters_never_raises(name: str, text: str) -> None:
    assert joined(FORMATS[name], list(text)) == joined(FORMATS[name], [text])


def test_content_comes_at_once() -> None:
    stream = FORMATS["tool_call"].stream()
    assert stream.feed("Hello") == ["Hello"]
    assert stream.feed(" there <to") == [" there"]
    assert stream.feed("day>") == [" <today>"]


def test_values_follow_the_schema() -> None:
    text = "<function=weather><parameter=city>75</parameter><parameter=days>3</parameter></function>"
    _, (call,) = FORMATS["tool_call"].parse(text, TOOLS)
    assert json.loads(call.arguments) == {"city": "75", "days": 3}
    _, (call,) = FORMATS["tool_call"].parse(text)
    assert json.loads(call.arguments) == {"city": 75, "days": 3}


def test_markers_and_brackets_within_arguments_are_theirs() -> None:
    arguments = {"code": 'if (a) { b("</tool_call>") } ]', "n": [1, {"x": None}], "half": "\ud800"}
    text = json.dumps({"name": "run", "arguments": arguments})
    said, (call,) = FORMATS["tool_call"].parse(f"<tool_call>{text}</tool_call>")
    assert said == "" and json.loads(call.arguments) == arguments
    call.arguments.encode()


def test_forced_schema_allows_calls_of_the_named_functions_only() -> None:
    assert forced_schema(TOOLS, "weather")["properties"]["name"] == {"const": "weather"}
    assert len(forced_schema([*TOOLS, {"name": "now"}])["anyOf"]) == 2


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("chatml", "tool_call"),
        ("mistral", "mistral"),
        ("chatglm3", "glm"),
        ("llama-3", "json"),
        ("{{ '<|observation|>' }}", "glm"),
        ("{{ '<|tool_call|>' }}", "tool_list"),
        ("{{ '<｜tool▁calls▁begin｜>' }}", "deepseek"),
        ("{{ '<|channel|>' }}", "harmony"),
        ("{{ '<|python_tag|>' }}", "llama"),
    ],
)
def test_the_chat_template_tells_the_format(template: str, name: str) -> None:
    chat = ChatTemplate.from_jinja(template) if "{" in template else ChatTemplate.builtin(template)
    form = find_tool_format(load_tokenizer(TOKENIZER).with_chat_template(chat))
    assert form is FORMATS[name]


def test_without_a_chat_template_there_is_no_format() -> None:
    assert find_tool_format(load_tokenizer(TOKENIZER).with_chat_template(None)) is None


def test_special_tokens_are_needed_where_markers_are_such() -> None:
    tokenizer = load_tokenizer(TOKENIZER)
    assert not FORMATS["tool_call"].needs_special(tokenizer)  # added there, but not special
    assert ToolFormat("x", keeps_special=("<|object_ref_start|>",)).needs_special(tokenizer)
