"""KServe v2 over HTTP, by Triton's own client and by hand."""

import gzip
import importlib.util
import json
import random
import struct

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from kserve_server import running
from oarsmith.engine import Engine, Sampling
from oarsmith.errors import MissingExtraError
from oarsmith.serve import kserve
from oarsmith.serve.kserve import require_grpc
from oarsmith.serve.service import Limits
from random_adapter import make_adapter

pytestmark = pytest.mark.usefixtures("few_threads")


@pytest.fixture(scope="module")
def server(chain_model):
    limits = Limits(max_new_tokens=64)
    with running(chain_model("one two three STOP four"), limits=limits, num_threads=1) as found:
        yield found


@pytest.fixture
def http(server):
    with httpx.Client(base_url=f"http://{server.http}", timeout=30) as found:
        yield found


@pytest.fixture
def client(server):
    with triton.InferenceServerClient(server.http) as found:
        yield found


def tensor(request, **options):
    found = triton.InferInput("IN", [1], "BYTES")
    text = request if isinstance(request, str) else json.dumps([request])
    found.set_data_from_numpy(np.array([text], dtype=np.object_), **options)
    return found


def native(result):
    [reply] = json.loads(result.as_numpy("OUT")[0])
    return reply


def test_health_and_metadata(client):
    assert client.is_server_live() and client.is_server_ready()
    for name in ("tiny", "model"):
        assert client.is_model_ready(name) and client.is_model_ready(name, "1")
        assert client.get_model_metadata(name)["inputs"] == [{"name": "IN", "datatype": "BYTES", "shape": [1]}]
        assert client.get_model_config(name)["model_transaction_policy"] == {"decoupled": True}
    assert client.get_server_metadata()["name"] == "oarsmith"
    assert {(row["name"], row["state"]) for row in client.get_model_repository_index()} == {
        ("tiny", "READY"),
        ("model", "READY"),
    }
    assert not client.is_model_ready("another")
    assert not client.is_model_ready("tiny", "2")
    with pytest.raises(InferenceServerException, match="there is no model 'another'"):
        client.get_model_metadata("another")


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("outputs", ["all", "binary", "json"])
@pytest.mark.parametrize("packed", [None, "gzip", "deflate"])
def test_infer(client, binary_in, outputs, packed):
    wanted = None if outputs == "all" else [triton.InferRequestedOutput("OUT", binary_data=outputs == "binary")]
    request = {"text": "count 🦊", "temperature": 0.0, "return_usage": True, "req_id": f"{binary_in}{outputs}{packed}"}
    inputs = [tensor(request, binary_data=binary_in)]
    result = client.infer("model", inputs, outputs=wanted, request_id="7", request_compression_algorithm=packed)
    reply = native(result)
    assert reply.pop("usage")["completion_tokens"] > 5
    assert reply == {
        "result": "one two three STOP four",
        "error_msg": "",
        "error_code": 0,
        "req_id": request["req_id"],
        "finish_reason": "stop",
    }
    assert result.get_response()["id"] == "7"
    assert result.get_response()["model_name"] == "model"


def test_parameters_of_the_request(client):
    result = client.infer("tiny", [tensor({"text": "a", "topp": 0})], priority=2, timeout=30_000_000, request_id="q")
    assert native(result)["req_id"] == "q"
    with pytest.raises(InferenceServerException, match="more than 1e-06 seconds") as raised:
        client.infer("tiny", [tensor({"text": "a", "topp": 0})], timeout=1)
    assert raised.value.status() == "504"
    with pytest.raises(InferenceServerException, match=r"parameters\.sequence_id: there is no such field"):
        client.infer("tiny", [tensor({"text": "a"})], sequence_id=5)


def body(**changes):
    tensor = {"name": "IN", "datatype": "BYTES", "shape": [1], "data": ['[{"text": "a", "topp": 0}]']}
    return {"inputs": [{**tensor, **changes}]}


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ({}, "inputs: Field required"),
        ([], "valid dictionary"),
        ({"inputs": []}, "inputs: List should have at least 1 item"),
        ({**body(), "more": 1}, "more: there is no such field"),
        (body(name="OTHER"), "there is no input 'OTHER'"),
        (body(datatype="INT32"), "must be BYTES"),
        (body(shape=[2]), "one element"),
        (body(shape=[]), "one element"),
        (body(shape=[-1]), "one element"),
        (body(shape=["1"]), "valid integer"),
        (body(data=None), "data must hold one text"),
        (body(data=[]), "data must hold one text"),
        (body(data=[1]), "data must hold one text"),
        (body(data=["a", "b"]), "data must hold one text"),
        (body(data=["no JSON"]), "not valid JSON"),
        (body(data=["[]"]), "the list has 0 requests"),
        (body(data=["5"]), "must be a JSON object"),
        (body(data=["[" * 100_000]), "not valid JSON"),
        (body(data=['{"text": "a", "stream": true}']), "ModelStreamInfer"),
        (body(data=['{"text": "a", "model": "another"}']), "there is no model"),
        (body(parameters={"binary_data_size": 4}), "both data and"),
        ({**body(), "outputs": [{"name": "OTHER"}]}, "there is no output"),
        ({**body(), "outputs": [{"name": "OUT", "parameters": {"classification": 3}}]}, "no such field"),
        ({**body(), "parameters": {"timeout": -1}}, "parameters.timeout"),
    ],
)
def test_what_is_no_inference_request(http, sent, message):
    answer = http.post("/v2/models/model/infer", json=sent)
    assert answer.status_code in (400, 404)
    assert message in answer.json()["error"]


def binary(header, behind, size=None, **headers):
    head = json.dumps(header).encode()
    headers = {"Inference-Header-Content-Length": str(len(head)) if size is None else size, **headers}
    return {"content": head + behind, "headers": headers}


PACKED = struct.pack("<I", 2) + b"{}"


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (binary(body(data=None, parameters={"binary_data_size": 6}), PACKED), "give one of text"),
        (binary(body(data=None, parameters={"binary_data_size": 7}), PACKED), "binary_data_size is 7, and 6 bytes"),
        (binary(body(data=None, parameters={"binary_data_size": 3}), PACKED[:3]), "3 bytes are no tensor"),
        (binary(body(data=None, parameters={"binary_data_size": 8}), PACKED + b"ab"), "8 bytes are no tensor"),
        (binary(body(data=None, parameters={"binary_data_size": -1}), PACKED), "binary_data_size"),
        (binary(body(data=None, parameters={"binary_data_size": 5}), b"\1\0\0\0\xff"), "not UTF-8"),
        (binary(body(data=None), PACKED), "no tensor has a binary_data_size"),
        (binary(body(), b"", size="100000"), "is '100000'"),
        (binary(body(), b"", size="-1"), "is '-1'"),
        (binary(body(), b"", size="9" * 5000), "is '9999"),
        (binary(body(), b"", size="five"), "is 'five'"),
        ({"content": b"\xff\xfe"}, "not valid JSON"),
        ({"content": b""}, "not valid JSON"),
        ({"content": b"1" * 5000}, "not valid JSON"),
        ({"content": b"abc", "headers": {"Content-Encoding": "gzip"}}, "no gzip data"),
        ({"content": gzip.compress(b"x" * 1000)[:-9], "headers": {"Content-Encoding": "gzip"}}, "ends early"),
        ({"content": gzip.compress(b" " * (17 << 20)), "headers": {"Content-Encoding": "gzip"}}, "when unpacked"),
        ({"content": b"abc", "headers": {"Content-Encoding": "br"}}, "'br' is not known"),
    ],
)
def test_bytes_that_are_no_inference_request(http, sent, message):
    answer = http.post("/v2/models/model/infer", **sent)
    assert 400 <= answer.status_code < 500, answer.text
    assert message in answer.json()["error"]


def events(answer):
    return [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n") if line]


@pytest.mark.parametrize(
    "sent",
    [
        {"text_input": "count\n", "parameters": {"temperature": 0, "max_tokens": 40, "stop": " STOP"}, "id": "5"},
        {"text_input": "count\n", "temperature": 0.0, "max_tokens": 40, "stop": [" STOP"], "id": "5"},
        {"text": "count", "top_k": 1, "stop_sequences": [" STOP"], "id": "5"},
        {"messages": [{"role": "user", "content": "count"}], "top_p": 0, "stop_sequences": [" STOP"], "id": "5"},
    ],
)
def test_generate(http, sent):
    answer = http.post("/v2/models/tiny/generate", json=sent).json()
    expected = {"id": "5", "model_name": "tiny", "model_version": "1", "text_output": "one two three"}
    assert answer == {**expected, "finish_reason": "stop"}
    answer = http.post("/v2/models/tiny/versions/1/generate_stream", json=sent)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *parts, last = events(answer)
    assert "".join(part["text_output"] for part in (*parts, last)) == "one two three"
    assert len(parts) > 3 and {part["id"] for part in parts} == {"5"}
    assert last["finish_reason"] == "stop" and last["usage"]["completion_tokens"] > 3


def test_generate_with_a_native_request(http):
    sent = {"IN": json.dumps([{"text": "count", "topp": 0, "req_id": "a"}])}
    [reply] = json.loads(http.post("/v2/models/model/generate", json=sent).json()["OUT"])
    assert (reply["result"], reply["req_id"]) == ("one two three STOP four", "a")
    replies = [
        json.loads(event["OUT"])[0] for event in events(http.post("/v2/models/model/generate_stream", json=sent))
    ]
    assert replies[-1]["tokens_all"] == "".join(reply["token"] for reply in replies) == "one two three STOP four"


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ([], "must be a JSON object"),
        ({}, "give one of text"),
        ({"text_input": ""}, "text: String should have at least 1 character"),
        ({"text_input": 5}, "text: Input should be a valid string"),
        ({"text_input": "a", "text": "b"}, "one of text_input and text"),
        ({"text_input": "a", "id": 5}, "id must be a text"),
        ({"text_input": "a", "parameters": 5}, "parameters must be"),
        ({"text_input": "a", "top_p": 1, "parameters": {"top_p": 1}}, "top_p is given twice"),
        ({"text_input": "a", "beams": 1}, "beams: there is no such field"),
        ({"text_input": "a", "stop": "a", "stop_sequences": ["b"]}, "mean the same"),
        ({"text_input": "a", "stream": True, "x": "generate_stream"}, "x: there is no such field"),
        ({"text_input": "a", "response_type": "openai"}, "response_type"),
        ({"text_input": "a", "system": "b"}, "without a chat template"),
        ({"IN": 5}, "IN must be a text"),
        ({"IN": "{}", "text": "a"}, "no place beside IN"),
    ],
)
@pytest.mark.parametrize("place", ["generate", "generate_stream"])
def test_what_generate_does_not_take(http, sent, message, place):
    answer = http.post(f"/v2/models/tiny/{place}", json=sent)
    assert answer.status_code == 400
    assert message in answer.json()["error"]


def test_generate_gives_one_reply(http):
    sent = {"text_input": "count\n", "topp": 0}
    answer = http.post("/v2/models/tiny/generate", json={**sent, "stream": True})
    assert (answer.status_code, "generate_stream" in answer.text) == (400, True)
    [event] = events(http.post("/v2/models/tiny/generate_stream", json={**sent, "stream": False}))
    assert event["text_output"] == "one two three STOP four"


def test_the_index_of_the_repository(http):
    assert len(http.post("/v2/repository/index").json()) == 2
    assert len(http.post("/v2/repository/index", json={"ready": True}).json()) == 2
    for sent in ([], {"ready": 1}):
        answer = http.post("/v2/repository/index", json=sent)
        assert (answer.status_code, "ready" in answer.json()["error"]) == (400, True)


def mutations(text, count):
    """Texts that a careless or hostile client might send in place of one that is right."""
    draws = random.Random(7)
    odd = ["null", "-1", "1e400", "[]", "{}", '""', "true", "NaN", '"\\ud800"', "9" * 400, "[" * 2000, "\0"]
    for _ in range(count):
        start = draws.randrange(len(text))
        end = min(len(text), start + draws.randrange(1, 12))
        yield text[:start] + draws.choice([*odd, "", text[start:end] * 2]) + text[end:]


@pytest.mark.parametrize(
    ("place", "sent"),
    [
        ("models/model/infer", body(data=[json.dumps([{"text": "a", "topp": 0, "max_dec_len": 3}])])),
        ("models/model/generate", {"text_input": "a\n", "parameters": {"topp": 0, "max_dec_len": 3}, "id": "1"}),
        ("models/model/generate_stream", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 3}),
        ("repository/index", {"ready": True}),
    ],
)
def test_malformed_bodies(http, place, sent):
    codes = set()
    for text in mutations(json.dumps(sent), 200):
        answer = http.post(f"/v2/{place}", content=text.encode())
        assert answer.status_code < 500, (text, answer.text)
        codes.add(answer.status_code)
        if answer.status_code >= 400:
            assert answer.json()["error"], text
            assert "Traceback" not in answer.text and ".py" not in answer.text
    assert 400 in codes
    assert http.get("/v2/health/ready").status_code == 200


def test_the_description_of_the_routes(http):
    paths = http.get("/openapi.json").json()["paths"]
    fields = paths["/v2/models/{name}/generate"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"text", "text_input", "max_dec_len", "req_id"} <= set(fields["properties"])
    assert "$ref" not in json.dumps(fields)
    assert {"200", "400", "404", "429"} <= set(paths["/v2/models/{name}/infer"]["post"]["responses"])


def test_adapters_by_their_names(chain_model, tmp_path):
    base = chain_model("one two three")
    adapter = make_adapter(base, tmp_path / "adapter")
    sampling = Sampling(max_new_tokens=8)
    expected = Engine(base, adapter=adapter).generate([[5, 6, 7]], sampling)[0].text
    plain = Engine(base).generate([[5, 6, 7]], sampling)[0].text
    assert expected != plain
    with running(base, adapters={"lora": adapter}) as server:
        sent = {"input_ids": [5, 6, 7], "topp": 0, "max_dec_len": 8}
        url = f"http://{server.http}/v2/models"

        def said(name, **more):
            return httpx.post(f"{url}/{name}/generate", json=sent | more, timeout=30).json()

        assert said("lora")["text_output"] == said("model", model="lora")["text_output"] == expected
        assert said("tiny")["text_output"] == said("model")["text_output"] == plain
        assert "names another one" in said("lora", model="tiny")["error"]
        with triton.InferenceServerClient(server.http) as client:
            assert client.is_model_ready("lora")
            assert native(client.infer("lora", [tensor(sent)]))["result"] == expected


@pytest.mark.parametrize("package", ["grpc", "google.protobuf", "google"])
def test_without_the_extra(monkeypatch, package):
    require_grpc()
    found = importlib.util.find_spec
    monkeypatch.setattr(kserve, "find_spec", lambda name: None if name == package else found(name))
    with pytest.raises(MissingExtraError, match=r"oarsmith\[grpc\]"):
        require_grpc()


def test_pages_are_free_again(server):
    server.wait_idle()
    pool = server.service.worker.engine.runner.scheduler.pool
    assert server.free_pages() == pool.num_pages
