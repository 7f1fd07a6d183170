"""What clients of OpenAI's API get wrong, and what is told of it: nothing is ignored, and nothing ends the server."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import httpx
import openai
import pytest

import oarsmith
from oarsmith.serve import openai as api
from oarsmith.serve.errors import ApiError
from oarsmith.serve.openai.schemas import ChatRequest
from oarsmith.serve.openai.tool_use import ToolUse
from oarsmith.serve.service import Limits
from tiny import TOKENIZER

pytestmark = pytest.mark.usefixtures("few_threads")
TEXT = "one two three"
HALF = "\ud800"  # of a character: JSON can spell it, UTF-8 cannot
HELLO = [{"role": "user", "content": "Hi"}]
CHAT, TEXTS, RESPONSES, OLD = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/api/chat"
CONSTRAINTS = [
    {"guided_regex": HALF},
    {"guided_grammar": f'start: "{HALF}"'},
    {"guided_choice": [HALF]},
    {"guided_json": {"enum": [HALF]}},
    {"guided_json": f'{{"enum": ["{HALF}"]}}'},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {HALF: 1}}}},
]


@pytest.fixture(scope="module")
def server(served, chain_model):
    with served(chain_model(TEXT, max_position_embeddings=1024), routers=[api.router]) as found:
        yield found


@pytest.fixture(scope="module")
def endless(served, chain_model):
    model = chain_model(TEXT, end=False, max_position_embeddings=4096)
    with served(model, routers=[api.router], limits=Limits(seconds=0.5), batch_size=1) as found:
        yield found


def post(server, path: str, body: dict[str, Any], **options: Any) -> httpx.Response:
    content = json.dumps(body)  # as httpx writes it, there would be no half characters
    headers = {"Content-Type": "application/json"}
    return httpx.post(f"{server.url}{path}", content=content, headers=headers, timeout=60, **options)


def chunks_of(answer: httpx.Response) -> list[dict[str, Any]]:
    lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


@pytest.mark.parametrize("fields", CONSTRAINTS)
def test_half_characters_do_not_end_the_engine(server, fields: dict[str, Any]) -> None:
    pytest.importorskip("llguidance")
    found = post(server, CHAT, {"messages": HELLO, "max_tokens": 4, **fields})
    assert found.status_code == 400 and found.json()["error"]["message"]
    assert server.service.worker.alive
    after = post(server, CHAT, {"messages": HELLO, "temperature": 0}).json()
    assert after["choices"][0]["message"]["content"] == TEXT


@pytest.mark.parametrize(
    "fields",
    [{"stop": HALF}, {"bad_words": [HALF]}, {"user": HALF}, {"model": HALF}, {HALF: 1}, {"metadata": {HALF: HALF}}],
)
def test_half_characters_elsewhere(server, fields: dict[str, Any]) -> None:
    found = post(server, CHAT, {"messages": HELLO, "max_tokens": 4, **fields})
    assert found.status_code < 500 and server.service.worker.alive
    server.wait_idle()


@pytest.mark.parametrize(
    ("path", "body", "word"),
    [
        *(
            (CHAT, {"chat_template_kwargs": {name: 1}}, name)
            for name in ("messages", "tools", "prompt", "param", "self")
        ),
        ("/tokenize", {"messages": HELLO, "chat_template_kwargs": {"where": 1}}, "where"),
        (CHAT, {"stream_options": {"include_usage": True}}, "stream_options"),
        (CHAT, {"guided_choice": []}, "guided_choice"),
        (CHAT, {"temperature": 0, "n": 2, "best_of": 1}, "best_of"),
        (CHAT, {"messages": None, "context": "Hi", "history": 5}, "history"),
        (RESPONSES, {"input": "Hi", "text": {"format": {"type": "json_schema"}}}, "schema"),
        (RESPONSES, {"input": "Hi", "tools": [{"type": "web_search"}]}, "tools"),
        (RESPONSES, {"input": "Hi", "store": True}, "store"),
        (TEXTS, {"prompt": "Hi", "suffix": "x"}, "suffix"),
        (TEXTS, {"prompt": "Hi", "max_tokens": 0}, "max_tokens"),
        ("/v1/embeddings", {"input": "Hi", "dimensions": 3}, "dimensions"),
        (OLD, {"context": "Hi", "surprise": 1}, "surprise"),
    ],
)
def test_nothing_is_ignored(server, path: str, body: dict[str, Any], word: str) -> None:
    if path == CHAT:
        body = {"messages": HELLO, **body}
        body = {name: value for name, value in body.items() if value is not None}
    found = post(server, path, body)
    assert found.status_code == 400 and word in found.json()["error"]["message"], found.text


def test_fields_of_accounts_change_nothing(server) -> None:
    fields = {"user": "me", "service_tier": "auto", "prompt_cache_key": "k", "safety_identifier": "s"}
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        chat = client.chat.completions.create(model="tiny", messages=HELLO, temperature=0, store=False, **fields)
        assert chat.choices[0].message.content == TEXT
        response = client.responses.create(
            model="tiny", input="Hi", temperature=0, store=False, tools=[], truncation="disabled", **fields
        )
        assert response.output_text == TEXT


def test_the_template_need_not_open_the_answer(server) -> None:
    counts = [
        post(server, "/tokenize", {"messages": HELLO, "add_generation_prompt": opens}).json()["count"]
        for opens in (True, False)
    ]
    for opens, count in zip((True, False), counts, strict=True):
        body = {"messages": HELLO, "add_generation_prompt": opens, "max_tokens": 1}
        assert post(server, CHAT, body).json()["usage"]["prompt_tokens"] == count
    assert counts[1] < counts[0]


@pytest.mark.parametrize("best_of", [None, 2])
def test_every_token_of_a_stream_has_its_probability_once(server, best_of: int | None) -> None:
    body = {"messages": HELLO, "logprobs": True, "temperature": 0.5, "top_k": 1, "best_of": best_of}
    whole = post(server, CHAT, body).json()["choices"][0]["logprobs"]["content"]
    choices = [c for chunk in chunks_of(post(server, CHAT, {**body, "stream": True})) for c in chunk["choices"]]
    parts = [one for choice in choices if choice["logprobs"] for one in choice["logprobs"]["content"]]
    assert [one["token"] for one in parts] == [one["token"] for one in whole]
    assert [one["logprob"] for one in parts] == pytest.approx([one["logprob"] for one in whole], abs=1e-5)


def two_calls(**fields: Any) -> tuple[ToolUse, str]:
    tools = [{"type": "function", "function": {"name": name}} for name in ("a", "b")]
    body = ChatRequest.model_validate({"messages": HELLO, "tools": tools, **fields})
    calls = (f'<tool_call>\n{{"name": "{name}", "arguments": {{}}}}\n</tool_call>' for name in ("a", "b"))
    return ToolUse.of(body, oarsmith.load_tokenizer(TOKENIZER)), "\n".join(calls)


@pytest.mark.parametrize(("parallel", "names"), [(None, ["a", "b"]), (True, ["a", "b"]), (False, ["a"])])
def test_one_call_where_only_one_is_wanted(parallel: bool | None, names: list[str]) -> None:
    use, text = two_calls(parallel_tool_calls=parallel)
    said, calls = use.read(text)
    assert (said.strip(), [call["function"]["name"] for call in calls]) == ("", names)
    reader = use.stream()
    deltas = [delta for char in text for delta in reader.feed(char)] + reader.finish()
    streamed = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert [(call["index"], call["function"]["name"]) for call in streamed] == list(enumerate(names))
    assert reader.num_calls == len(names)


def test_a_tool_that_is_not_there() -> None:
    with pytest.raises(ApiError, match="none of the tools"):
        two_calls(tool_choice={"type": "function", "function": {"name": "c"}})


def test_time_is_up_in_every_kind_of_stream(endless) -> None:
    lines = post(endless, OLD, {"context": "Hi", "temperature": 0, "max_length": 4000}).text.splitlines()
    assert json.loads(lines[0])["error_code"] == 0
    last = json.loads(lines[-1])
    assert last["error_code"] == 1 and "0.5 seconds" in last["error_msg"]
    body = {"input": "Hi", "temperature": 0, "max_output_tokens": 4000, "stream": True}
    events = chunks_of(post(endless, RESPONSES, body))
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    error, failed = events[-2:]
    assert (error["type"], error["code"]) == ("error", "timeout")
    assert (failed["type"], failed["response"]["status"]) == ("response.failed", "failed")
    assert "0.5 seconds" in failed["response"]["error"]["message"]
    endless.wait_idle()


def test_who_leaves_while_waiting_is_no_longer_waited_for(served, chain_model) -> None:
    """Its stream has not begun: another answer has the only place."""
    model = chain_model(TEXT, end=False, max_position_embeddings=4096)
    with served(model, routers=[api.router], limits=Limits(seconds=30), batch_size=1) as found:
        body = {"messages": HELLO, "temperature": 0, "max_tokens": 3900, "stream": True}
        worker = found.service.worker
        with httpx.stream("POST", f"{found.url}{CHAT}", json=body, timeout=30) as first:
            lines = first.iter_lines()
            next(lines)

            def leave() -> None:
                with pytest.raises(httpx.ReadTimeout):
                    httpx.post(f"{found.url}{CHAT}", json=body, timeout=0.2)

            thread = threading.Thread(target=leave)
            thread.start()
            thread.join(10)
            until = time.monotonic() + 5
            while worker.num_open > 1 and time.monotonic() < until:
                time.sleep(0.02)
            assert worker.num_open <= 1, "the one that left still waits"
            assert next(line for line in lines if line)
        found.wait_idle()
