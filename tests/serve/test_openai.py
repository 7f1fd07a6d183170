"""OpenAI's API, by OpenAI's own client against a real server."""

from __future__ import annotations

import base64
import json
import time
from array import array
from contextlib import suppress
from typing import Any

import httpx
import openai
import pytest

from oarsmith.engine import Engine, Sampling
from oarsmith.serve import openai as api
from oarsmith.serve.service import Limits

pytestmark = pytest.mark.usefixtures("few_threads")
TEXT = "one two three"
HELLO = [{"role": "user", "content": "Hi"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"days": {"enum": [1, 2]}},
            "required": ["days"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def server(served, chain_model):
    model, limits = chain_model(TEXT, max_position_embeddings=1024), Limits(max_new_tokens=64, max_answers=8)
    with served(model, routers=[api.router], limits=limits) as found:
        yield found


@pytest.fixture(scope="module")
def endless(served, chain_model):
    model, limits = chain_model(TEXT, end=False, max_position_embeddings=4096), Limits(seconds=0.3)
    with served(model, routers=[api.router], limits=limits) as found:
        yield found


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def chat(client: openai.OpenAI, **more: Any) -> Any:
    return client.chat.completions.create(**{"model": "tiny", "messages": HELLO, "temperature": 0, **more})


def test_models(client) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "oarsmith"
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'"):
        client.models.retrieve("other")


def test_a_chat(client, server) -> None:
    found = chat(client)
    (choice,) = found.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", TEXT, "stop")
    ids = server.service.tokenizer.encode(TEXT)
    assert found.usage.completion_tokens == len(ids) + 1
    assert found.usage.prompt_tokens == len(server.service.worker.engine.encode(HELLO))
    assert found.object == "chat.completion" and abs(found.created - time.time()) < 60
    cut = chat(client, max_tokens=2)
    assert (cut.choices[0].finish_reason, cut.usage.completion_tokens) == ("length", 2)
    assert chat(client, max_completion_tokens=2).choices[0].message.content == cut.choices[0].message.content
    assert chat(client, stop=[" three"]).choices[0].message.content == "one two"


def test_answers_that_are_all_alike(client) -> None:
    found = chat(client, n=3)
    assert [(choice.index, choice.message.content) for choice in found.choices] == [(i, TEXT) for i in range(3)]
    streams: dict[int, str] = {}
    for chunk in chat(client, n=3, stream=True):
        for choice in chunk.choices:
            streams[choice.index] = streams.get(choice.index, "") + (choice.delta.content or "")
    assert streams == dict.fromkeys(range(3), TEXT)
    drawn = chat(client, n=2, temperature=1.0, seed=3, extra_body={"top_k": 1})
    assert [choice.message.content for choice in drawn.choices] == [TEXT, TEXT]


@pytest.mark.parametrize("best_of", [None, 3])
def test_a_stream(client, best_of: int | None) -> None:
    more = {} if best_of is None else {"temperature": 0.5, "extra_body": {"best_of": best_of, "top_k": 1}}
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}, **more))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices) == TEXT
    reasons = [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason]
    assert reasons == ["stop"] and chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens > 0
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_log_probabilities(client, server, chain_model) -> None:
    found = chat(client, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    prompt = server.service.worker.engine.encode(HELLO)
    expected = Engine(chain_model(TEXT)).generate([prompt], Sampling(max_new_tokens=64, logprobs=2))[0].logprobs
    assert [one.logprob for one in found] == pytest.approx([one.logprob for one in expected], abs=1e-3)
    assert all(len(one.top_logprobs) == 2 and one.top_logprobs[0].token == one.token for one in found)
    streamed = [c.logprobs for chunk in chat(client, logprobs=True, stream=True) for c in chunk.choices if c.logprobs]
    assert [one.content[0].logprob for one in streamed] == pytest.approx([one.logprob for one in found], abs=1e-6)


def test_completions(client, server) -> None:
    tokenizer = server.service.tokenizer
    prompts = ["Hi\n", "Ho\n"]
    found = client.completions.create(model="tiny", prompt=prompts, temperature=0, max_tokens=20, logprobs=1, echo=True)
    assert [choice.text for choice in found.choices] == [f"{prompt}{TEXT}" for prompt in prompts]
    logprobs = found.choices[0].logprobs
    assert logprobs.token_logprobs[0] is None and "".join(logprobs.tokens).startswith("Hi\n")
    assert len(logprobs.tokens) == len(logprobs.text_offset) == len(logprobs.top_logprobs)
    ids = client.completions.create(model="tiny", prompt=tokenizer.encode("Hi\n"), temperature=0, max_tokens=20)
    assert ids.choices[0].text == TEXT
    silent = client.completions.create(model="tiny", prompt="Hi\n", max_tokens=0, echo=True, logprobs=0)
    assert (silent.choices[0].text, silent.usage.completion_tokens) == ("Hi\n", 0)
    texts: dict[int, str] = {}
    for chunk in client.completions.create(
        model="tiny", prompt=prompts, temperature=0, max_tokens=20, n=2, stream=True
    ):
        texts[chunk.choices[0].index] = texts.get(chunk.choices[0].index, "") + chunk.choices[0].text
    assert texts == dict.fromkeys(range(4), TEXT)


def test_constraints(client) -> None:
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert json.loads(chat(client, response_format=form).choices[0].message.content)["a"] in (1, 2)
    found = chat(client, extra_body={"guided_choice": ["yes", "no"]}).choices[0].message.content
    assert found in ("yes", "no")
    assert chat(client, extra_body={"guided_regex": "[0-9]{3}"}).choices[0].message.content.isdecimal()


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_calls_that_are_demanded(client, choice: Any) -> None:
    pytest.importorskip("llguidance")
    found = chat(client, tools=[WEATHER], tool_choice=choice).choices[0]
    (call,) = found.message.tool_calls
    assert call.function.name == "weather" and json.loads(call.function.arguments)["days"] in (1, 2)
    assert (found.finish_reason, found.message.content) == ("tool_calls", None)
    chunks = [c for chunk in chat(client, tools=[WEATHER], tool_choice=choice, stream=True) for c in chunk.choices]
    assert [c.finish_reason for c in chunks if c.finish_reason] == ["tool_calls"]
    (streamed,) = [c.delta.tool_calls[0] for c in chunks if c.delta.tool_calls]
    assert json.loads(streamed.function.arguments) == json.loads(call.function.arguments)


def test_tools_that_nobody_has_to_call(client) -> None:
    assert chat(client, tools=[WEATHER]).choices[0].message.content == TEXT
    assert chat(client, tools=[WEATHER], tool_choice="none").choices[0].message.content == TEXT
    result = [
        *HELLO,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"days": 1}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    assert chat(client, messages=result, tools=[WEATHER]).choices[0].message.content == TEXT


def test_embeddings(client) -> None:
    found = client.embeddings.create(model="tiny", input=["one", "two", "one"])
    first, second, third = (one.embedding for one in found.data)
    assert sum(x * x for x in first) == pytest.approx(1, abs=1e-4)
    assert first == pytest.approx(third, abs=1e-5) and first != pytest.approx(second, abs=1e-2)
    raw = httpx.post(f"{client.base_url}embeddings", json={"input": "one", "encoding_format": "base64"}).json()
    assert array("f", base64.b64decode(raw["data"][0]["embedding"])).tolist() == pytest.approx(first, abs=1e-5)


def test_responses(client) -> None:
    found = client.responses.create(model="tiny", input="Hi", instructions="Be brief", temperature=0)
    assert (found.output_text, found.status) == (TEXT, "completed")
    events = list(client.responses.create(model="tiny", input=[{"role": "user", "content": "Hi"}], stream=True))
    assert events[0].type == "response.created" and events[-1].type == "response.completed"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == TEXT
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        client.responses.create(model="tiny", input="Hi", previous_response_id="resp_1")


def test_tokens(server) -> None:
    found = httpx.post(f"{server.url}/tokenize", json={"prompt": TEXT, "return_token_strs": True}).json()
    assert found["tokens"] == server.service.tokenizer.encode(TEXT) and len(found["token_strs"]) == found["count"]
    back = httpx.post(f"{server.url}/detokenize", json={"tokens": found["tokens"]}).json()
    assert back == {"prompt": TEXT}
    assert httpx.post(f"{server.url}/detokenize", json={"tokens": [10**6]}).status_code == 400


def test_the_old_server_s_requests(server) -> None:
    url = f"{server.url}/v1/chat/completions"
    for body in (
        {"message": "Hi", "max_length": 20},
        {"message": {"role": "user", "content": "Hi"}},
        {"context": "Hi", "history": ["Hello", "Hello to you"], "top_k": 1},
        {"messages": "Hi", "src_length": 500},
    ):
        found = httpx.post(url, json={"temperature": 0, **body}).json()
        assert found["choices"][0]["message"]["content"] == TEXT, body
    lines = httpx.post(f"{server.url}/api/chat", json={"context": "Hi", "temperature": 0}).text.splitlines()
    said = [json.loads(line) for line in lines]
    assert "".join(one["result"]["response"]["utterance"] for one in said) == TEXT
    assert {one["error_code"] for one in said} == {0}
    native = httpx.post(url, json={"text": "Hi\n", "temperature": 0}).json()
    assert (native["result"], native["error_code"]) == (TEXT, 0)


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        ({"messages": []}, 400, "messages"),
        ({"messages": HELLO, "temperature": "hot"}, 400, "temperature"),
        ({"messages": HELLO, "surprise": 1}, 400, "surprise"),
        ({"messages": HELLO, "max_tokens": 65}, 400, "at most 64"),
        ({"messages": HELLO, "n": 9, "temperature": 1}, 400, "at most 8"),
        ({"messages": HELLO, "model": "other"}, 404, "there is no model"),
        ({"messages": HELLO, "top_logprobs": 2}, 400, "top_logprobs"),
        ({"messages": HELLO, "tool_choice": "required"}, 400, "no tools"),
        ({"messages": HELLO, "logit_bias": {"x": 1}}, 400, "logit_bias"),
        ({"messages": HELLO, "max_tokens": 3, "min_tokens": 5}, 400, "min_new_tokens"),
        ({"messages": [{"role": "user", "content": "x " * 5000}]}, 400, "context"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}]}, 400, "text"),
    ],
)
def test_refusals(server, body: dict[str, Any], status: int, word: str) -> None:
    found = httpx.post(f"{server.url}/v1/chat/completions", json=body)
    error = found.json()["error"]
    assert (found.status_code, word in error["message"]) == (status, True), error
    assert not error["message"].startswith("openai.") and "/" not in error["message"].replace("top-p/", "")


def test_who_leaves_is_no_longer_worked_for(endless) -> None:
    free = endless.free_pages()
    for stream in (True, False):
        body = {"messages": HELLO, "stream": stream, "temperature": 0}
        url = f"{endless.url}/v1/chat/completions"
        with suppress(httpx.ReadTimeout), httpx.stream("POST", url, json=body, timeout=0.1) as response:
            next(response.iter_lines())
        endless.wait_idle()
        assert endless.free_pages() == free


def test_too_long(endless) -> None:
    url, body = f"{endless.url}/v1/chat/completions", {"messages": HELLO, "temperature": 0, "max_tokens": 4000}
    found = httpx.post(url, json={**body, "ignore_eos": True}, timeout=30)
    assert (found.status_code, found.json()["error"]["code"]) == (504, "timeout")
    with httpx.stream("POST", url, json={**body, "stream": True}, timeout=30) as response:
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]" and json.loads(lines[-2][6:])["error"]["code"] == "timeout"
    endless.wait_idle()
