"""A reward model behind HTTP: vLLM's and PaddleNLP's requests, limits and errors."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from oarsmith import cli
from oarsmith.config.load import load_config
from oarsmith.config.serve import ServeConfig
from oarsmith.engine import Engine
from oarsmith.jobs.serve import make_app, make_steps
from oarsmith.serve import openai as api
from oarsmith.serve import scores
from oarsmith.serve.keys import Keys, new_key
from oarsmith.serve.service import Limits
from tiny import write_tiny_model

from .conftest import Served, serving

pytestmark = pytest.mark.usefixtures("few_threads")
ASKED = {"role": "user", "content": "Say 3."}
SAID = [[ASKED, {"role": "assistant", "content": text}] for text in ("Yes.", "No, never that.")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scores") / "reward"
    return write_tiny_model(folder, architectures=["LlamaForSequenceClassification"], id2label={"0": "LABEL_0"})


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Served]:
    routers, limits = [api.router, scores.router], Limits(max_prompt_tokens=100)
    with serving(model, routers, limits=limits) as found:
        yield found


@pytest.fixture(scope="module")
def engine(model: Path) -> Engine:
    return Engine(model, num_threads=1)


def post(server: Served, path: str, body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, timeout=30)


def test_pooling(server: Served, engine: Engine) -> None:
    expected = engine.score(SAID)
    for conversation, score in zip(SAID, expected, strict=True):
        found = post(server, "/pooling", {"model": "tiny", "messages": conversation}).json()
        assert found["object"] == "list" and found["model"] == "tiny" and found["id"].startswith("pool-")
        assert found["data"] == [{"index": 0, "object": "pooling", "data": [pytest.approx(score, abs=1e-5)]}]
    texts = ["a boat", "two boats"]
    found = post(server, "/pooling", {"input": texts}).json()
    assert [one["data"][0] for one in found["data"]] == pytest.approx(engine.score(texts), abs=1e-5)
    ids = [engine.tokenizer.encode(text) for text in texts] if engine.tokenizer is not None else []
    assert found["usage"]["prompt_tokens"] == sum(map(len, ids))
    again = post(server, "/pooling", {"input": ids}).json()
    assert [one["data"] for one in again["data"]] == [one["data"] for one in found["data"]]


def test_the_suite_s_schema(server: Served, engine: Engine) -> None:
    prompt = "<|im_start|>user\nSay 3.<|im_end|>\n<|im_start|>assistant\n"
    body = {"src": [prompt] * 2, "tgt": ["", ""], "response": ["Yes.", "No, never that."]}
    request = urllib.request.Request(server.url + "/", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        found = json.loads(answer.read())
    assert (found["error_code"], found["error_msg"]) == (0, "")
    assert found["score"] == pytest.approx(engine.score(SAID), abs=1e-5)
    refused = post(server, "/", {"src": ["a"], "response": ["b" * 3000]})
    assert refused.status_code == 400 and refused.json()["error_code"] == 400 and refused.json()["score"] == []
    assert "context of 256" in refused.json()["error_msg"]


@pytest.mark.parametrize(
    ("path", "body", "part"),
    [
        ("/pooling", {}, "either input or messages"),
        ("/pooling", {"input": "a", "messages": SAID[0]}, "either input or messages"),
        ("/pooling", {"messages": [ASKED]}, "where the assistant should speak"),
        ("/pooling", {"input": [[5, 99999]]}, "outside the model's vocabulary"),
        ("/pooling", {"input": [[5]]}, "fewer than two tokens"),
        ("/pooling", {"input": [[5] * 150]}, "more than the 100 that this server takes"),
        ("/pooling", {"input": "a", "dimensions": 3}, "dimensions"),
        ("/pooling", {"input": "a", "use_activation": True}, "use_activation"),
        ("/pooling", {"input": "a", "model": "other"}, "there is no model 'other'"),
        ("/", {"src": ["a"], "response": []}, "response"),
        ("/", {"src": ["a", "b"], "response": ["c"]}, "src has 2 texts and response 1"),
        ("/v1/chat/completions", {"messages": [ASKED]}, "this is a reward model: it scores answers and writes none"),
        ("/v1/chat/completions", {"messages": [ASKED], "stream": True}, "it scores answers and writes none"),
        ("/v1/completions", {"prompt": "a"}, "it scores answers and writes none"),
        ("/v1/responses", {"input": "a"}, "it scores answers and writes none"),
    ],
)
def test_refused(server: Served, path: str, body: Any, part: str) -> None:
    answer = post(server, path, body)
    assert answer.status_code in (400, 404) and part in answer.json()["error"]["message"], answer.text
    server.wait_idle()


def test_a_model_that_writes_has_none(tmp_path: Path) -> None:
    with serving(write_tiny_model(tmp_path / "llama"), [scores.router]) as found:
        for path, body in (("/pooling", {"messages": SAID[0]}), ("/", {"src": ["a"], "response": ["b"]})):
            answer = post(found, path, body)
            assert answer.status_code == 400 and "gives no scores" in answer.text


def test_keys_pay_for_scores(model: Path, tmp_path: Path) -> None:
    """The whole application: what the command serves, behind its gate."""
    key, line = new_key("mine")
    file = tmp_path / "keys"
    file.write_text(line.rstrip() + "\n")
    config = load_config(ServeConfig, None, [str(model), "--api_keys", str(file)]).config
    keys = Keys(str(file))
    with serving(model, wrap=lambda app, service: make_app(config, service, keys)) as found:
        assert post(found, "/pooling", {"messages": SAID[0]}).status_code == 401
        headers = {"Authorization": f"Bearer {key}"}
        answer = httpx.post(f"{found.url}/pooling", json={"messages": SAID[0]}, headers=headers, timeout=30)
        assert answer.status_code == 200
        assert httpx.post(f"{found.url}/", json={"src": ["a"], "response": ["b"]}, headers=headers).status_code == 200


def test_steps_are_judged(tmp_path: Path) -> None:
    """A model that writes judges steps by two tokens, as vLLM's pooling of steps has it; it still writes."""
    folder = write_tiny_model(tmp_path / "llama")
    config = load_config(ServeConfig, None, [str(folder), "--process_reward", "--step_separator", "ки"]).config
    told = [ASKED, {"role": "assistant", "content": "Three.киNo.ки"}]

    def app(_: Any, service: Any) -> Any:
        service.steps = make_steps(config, service.worker.engine)
        return make_app(config, service, None)

    with serving(folder, wrap=app) as found:
        answer = post(found, "/pooling", {"messages": told})
        assert answer.status_code == 200, answer.text
        (data,) = answer.json()["data"]
        engine = found.service.worker.engine
        row = engine.answers.read_steps(told, "ки")
        assert len(row.step_ends) == 2 and found.service.steps is not None
        (expected,) = engine.score_steps([row], found.service.steps.reward_tokens)
        assert data["data"] == [[pytest.approx(good, abs=1e-5), pytest.approx(1 - good, abs=1e-5)] for good in expected]
        for path, body, part in (
            ("/pooling", {"input": "a text"}, "give messages"),
            ("/pooling", {"messages": [ASKED, {"role": "assistant", "content": "ки"}]}, "no step"),
            ("/", {"src": ["a"], "response": ["b"]}, "ask /pooling"),
        ):
            refused = post(found, path, body)
            assert refused.status_code == 400 and part in refused.text, refused.text
        assert post(found, "/v1/completions", {"prompt": "a", "max_tokens": 2}).status_code == 200


def test_a_model_of_whole_answers_judges_no_steps(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", str(model), "--process_reward", "--port", "0"]) == cli.EXIT_BAD_INPUT
    assert "scores whole answers" in capsys.readouterr().err
