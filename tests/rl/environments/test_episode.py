"""Environments and tools in token ids: what is appended is what the template says, and nothing is encoded again."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

import pytest

import oarsmith
from oarsmith.errors import ConfigError, OarsmithError
from oarsmith.rl.environments.environment import EpisodeError, Turn, find_environment
from oarsmith.rl.environments.episode import Episode, EpisodeLimits
from oarsmith.rl.environments.hints import schema_of
from oarsmith.rl.environments.suffix import SuffixEncoder
from oarsmith.rl.environments.tools import Tool, ToolEnvironment, find_tools
from oarsmith.text import ChatTemplate, Tokenizer
from tiny import TOKENIZER

TEMPLATES = TOKENIZER.parent / "chat_render" / "templates"
ASKED = [{"role": "user", "content": "What is 2 + 3?"}]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'


def add(a: int, b: int = 1) -> int:
    """Add two numbers.

    Args:
        a: the first one.
        b (int): the second one.
    """
    return a + b


def fail(text: str) -> str:
    """Fails."""
    raise RuntimeError(f"no {text}")


def slow() -> str:
    """Takes long."""
    time.sleep(30)
    return "late"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    source = (TEMPLATES / "qwen2_5.jinja").read_text()
    return oarsmith.load_tokenizer(TOKENIZER).with_chat_template(ChatTemplate.from_jinja(source))


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text + "<|im_end|>", False)


def test_schemas_of_hints() -> None:
    def every(
        a: str, b: float | None, c: list[int], d: Literal["x", "y"] = "x", e: dict[str, bool] | None = None
    ) -> str:
        """Says much."""
        return a

    found = schema_of(every)["function"]
    assert found["description"] == "Says much." and found["parameters"]["required"] == ["a", "b", "c"]
    assert found["parameters"]["properties"]["b"] == {"anyOf": [{"type": "number"}, {"type": "null"}]}
    assert found["parameters"]["properties"]["c"] == {"type": "array", "items": {"type": "integer"}}
    assert schema_of(add)["function"]["parameters"]["properties"] == {
        "a": {"type": "integer", "description": "the first one."},
        "b": {"type": "integer", "description": "the second one."},
    }

    def bare(a) -> str:  # type: ignore[no-untyped-def]
        return ""

    def odd(a: Path) -> str:
        return ""

    for function, part in ((bare, "has no type hint"), (odd, "JSON has no word for")):
        with pytest.raises(ConfigError, match=part):
            schema_of(function)


def test_what_a_tool_says() -> None:
    assert Tool(add).call({"a": 2, "b": 3}) == ("5", False) and Tool(add).call({"a": 2}) == ("3", False)
    assert Tool(fail).call({"text": "x"}) == ("error: RuntimeError: no x", True)
    for wrong in ({}, {"a": "2"}, {"a": 1, "c": 2}, {"a": True}):
        told, failed = Tool(add).call(wrong)
        assert failed and told.startswith("error: the arguments do not fit add")
    began = time.monotonic()
    assert Tool(slow, timeout=0.2).call({}) == ("error: slow took longer than 0.2 s", True)
    assert time.monotonic() - began < 5


def test_tools_by_name(tmp_path: Path) -> None:
    file = tmp_path / "tools_given.py"
    file.write_text("def f(a: int) -> int:\n    return a\nasync def g(a: int) -> int:\n    return a\n")
    assert [tool.name for tool in find_tools([f"{file}:f"])] == ["f"]
    for names, part in (
        ([f"{file}:f"] * 2, "two tools"),
        ([f"{file}:g"], "is async"),
        ([f"{file}:h"], "there is no 'h'"),
    ):
        with pytest.raises(ConfigError, match=part):
            find_tools(names)


def test_a_conversation_with_a_tool(tokenizer: Tokenizer) -> None:
    tools = ToolEnvironment([Tool(add), Tool(fail)], tokenizer)
    encoder = SuffixEncoder(tokenizer, tools=tools.schemas)
    episode = Episode(tools, encoder, EpisodeLimits())
    prompt = episode.begin({}, ASKED)
    assert tokenizer.decode(prompt) == tokenizer.apply_chat_template(ASKED, tools.schemas, True)
    # Tokens that no encoder would give for this text stay as they are.
    written = [token for character in CALL for token in tokenizer.encode(character, False)]
    written.append(tokenizer.token_to_id("<|im_end|>") or 0)
    appended = episode.after(written)
    assert appended is not None
    expected = "\n<|im_start|>user\n<tool_response>\n5\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(appended) == expected and episode.ids == [*written, *appended]
    assert episode.own == [True] * len(written) + [False] * len(appended)
    assert episode.after(ids_of(tokenizer, "It is 5.")) is None and episode.over == "done"
    assert (tools.num_calls, tools.num_errors, episode.num_turns, episode.reward) == (1, 0, 2, None)


@pytest.mark.parametrize(
    ("call", "part"),
    [
        ('{"name": "nothing", "arguments": {}}', "error: there is no tool 'nothing'; there are add, fail"),
        ('{"name": "fail", "arguments": {"text": "luck"}}', "error: RuntimeError: no luck"),
        ('{"name": "add", "arguments": {"a": "x"}}', "error: the arguments do not fit add"),
    ],
)
def test_errors_are_the_model_s_to_read(tokenizer: Tokenizer, call: str, part: str) -> None:
    tools = ToolEnvironment([Tool(add), Tool(fail)], tokenizer)
    episode = Episode(tools, SuffixEncoder(tokenizer, tools=tools.schemas), EpisodeLimits())
    episode.begin({}, ASKED)
    appended = episode.after(ids_of(tokenizer, f"<tool_call>\n{call}\n</tool_call>"))
    assert appended is not None and part in tokenizer.decode(appended) and tools.num_errors == 1


def test_what_is_no_call_ends_it(tokenizer: Tokenizer) -> None:
    for text in ("<tool_call>{", "<tool_call>\n[1]\n</tool_call>", ""):
        tools = ToolEnvironment([Tool(add)], tokenizer)
        episode = Episode(tools, SuffixEncoder(tokenizer, tools=tools.schemas), EpisodeLimits())
        episode.begin({}, ASKED)
        assert episode.after(ids_of(tokenizer, text)) is None and episode.over == "done"


class Guess:
    """A number to be found."""

    def reset(self, row: Any) -> list[dict[str, Any]] | None:
        self.number = row["number"]
        return [{"role": "user", "content": "Guess from 1 to 9."}]

    def step(self, completion: str) -> Turn:
        guess = int(completion)
        if guess == self.number:
            return Turn(done=True, reward=1.0)
        told = "higher" if guess < self.number else "lower"
        return Turn(messages=({"role": "user", "content": told},), reward=-0.1)


@pytest.mark.parametrize(
    "name",
    [
        "chatml",
        "llama-3",
        "gemma",
        "mistral",
        "internlm2",
        "qwen2_5.jinja",
        "qwen3.jinja",
        "llama3_1.jinja",
        "phi3.jinja",
    ],
)
def test_turns_are_what_the_template_renders(tokenizer: Tokenizer, name: str) -> None:
    """Prompt, texts of the model and turns end to end are the conversation as the template renders it whole."""
    template = (TEMPLATES / name).read_text() if name.endswith("jinja") else ChatTemplate.builtin(name)
    made = template if isinstance(template, ChatTemplate) else ChatTemplate.from_jinja(template)
    using = tokenizer.with_chat_template(made)
    episode = Episode(Guess(), SuffixEncoder(using), EpisodeLimits())
    prompt = episode.begin({"number": 7}, ASKED)
    messages = [{"role": "user", "content": "Guess from 1 to 9."}]
    text = using.decode(prompt)
    for guess, told in (("3", "higher"), ("9", "lower")):
        written = using.encode(guess, False)
        appended = episode.after(written)
        assert appended is not None
        text += guess + using.decode(appended)
        messages += [{"role": "assistant", "content": guess}, {"role": "user", "content": told}]
    expected = using.apply_chat_template(messages, None, True)
    assert text.replace(" ", "") == expected.replace(" ", ""), (text, expected)
    assert episode.after(using.encode("7", False)) is None
    assert episode.over == "done" and episode.reward == pytest.approx(0.8)


def test_limits(tokenizer: Tokenizer) -> None:
    def begun(**limits: int) -> Episode:
        episode = Episode(Guess(), SuffixEncoder(tokenizer), EpisodeLimits(**limits))
        episode.begin({"number": 7}, ASKED)
        return episode

    episode = begun(max_turns=1)
    assert episode.after(ids_of(tokenizer, "1")) is None and episode.over == "turns" and episode.reward == -0.1
    episode = begun(max_tokens=6)
    assert episode.after(ids_of(tokenizer, "1")) is None and episode.over == "length" and episode.room == 4
    episode = begun()
    assert episode.after(tokenizer.encode("1", False), truncated=True) is None and episode.over == "truncated"

    class Long(Guess):
        def step(self, completion: str) -> Turn:
            return Turn(messages=({"role": "user", "content": "word " * 500},))

    episode = Episode(Long(), SuffixEncoder(tokenizer), EpisodeLimits(max_appended=100))
    episode.begin({"number": 7}, ASKED)
    appended = episode.after(ids_of(tokenizer, "1"))
    assert appended is not None and 50 < len(appended) <= 100 and tokenizer.decode(appended).endswith("assistant\n")


def test_what_environments_do_wrong(tokenizer: Tokenizer) -> None:
    def stepped(step: Any) -> None:
        made = type("Made", (Guess,), {"step": lambda self, text: step(text)})()
        episode = Episode(made, SuffixEncoder(tokenizer), EpisodeLimits())
        episode.begin({"number": 7}, ASKED)
        episode.after(ids_of(tokenizer, "1"))

    for step, part in (
        (lambda text: 1 / 0, "failed in step: ZeroDivisionError"),
        (lambda text: "text", "step returned a str"),
        (lambda text: Turn(done=True, reward=float("nan")), "reward is nan"),
        (lambda text: Turn(), "either messages or text"),
        (lambda text: Turn(text="a", done=True), "appends nothing"),
        (lambda text: Turn(messages=({"role": "nobody", "content": "unseen"},)), "leaves out a message|refuses"),
    ):
        with pytest.raises(EpisodeError, match=part):
            stepped(step)
    with pytest.raises(EpisodeError, match="failed in reset: KeyError"):
        Episode(Guess(), SuffixEncoder(tokenizer), EpisodeLimits()).begin({}, ASKED)


def test_by_name(tmp_path: Path) -> None:
    file = tmp_path / "given_environment.py"
    file.write_text(
        "class Good:\n    def reset(self, row): return None\n    def step(self, completion): return None\n"
        "class Half:\n    def reset(self, row): return None\n"
        "class Asks:\n    def __init__(self, x): pass\n"
    )
    assert find_environment(f"{file}:Good")() is not None
    for name, part in (("Half", "has no step"), ("Asks", "without arguments"), ("None_", "there is no 'None_'")):
        with pytest.raises(OarsmithError, match=part):
            find_environment(f"{file}:{name}")


def test_a_text_that_is_appended(tokenizer: Tokenizer) -> None:
    encoder = SuffixEncoder(tokenizer)
    assert tokenizer.decode(encoder.turn_ids(ASKED, Turn(text=" and then"), [5])) == " and then"
