"""Requests of PaddleNLP's server: what is taken, what it means, what is answered over HTTP."""

import json
import threading
import time

import httpx
import pytest
from fastapi import APIRouter, Request

from kserve_server import running
from oarsmith.serve.errors import ApiError
from oarsmith.serve.kserve.answer import answer_native
from oarsmith.serve.kserve.native import parse, parse_text, prepare
from oarsmith.serve.service import Limits

pytestmark = pytest.mark.usefixtures("few_threads")

TEXT = "zqxjkvbwZQXJKVBW"


def chat_route(service):
    routes = APIRouter()

    @routes.post("/v1/chat/completions")
    async def chat(request: Request):
        return await answer_native(service, parse_text(await request.body()), request)

    return [routes]


@pytest.fixture(scope="module")
def server(chain_model):
    model = chain_model(TEXT)
    with running(model, limits=Limits(max_new_tokens=100), more=chat_route, num_threads=1) as found:
        yield found


@pytest.fixture
def ask(server):
    with httpx.Client(base_url=f"http://{server.http}", timeout=30) as client:
        yield lambda **fields: client.post("/v1/chat/completions", json=fields)


def prepared(server, **fields):
    return server.call(prepare(server.service, parse(fields)))


def test_defaults(server):
    job = prepared(server, text="count")
    sampling = job.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.repetition_penalty) == (0.95, 0.7, 0, 1.0)
    assert (sampling.min_new_tokens, sampling.max_new_tokens) == (1, 100)
    assert (sampling.frequency_penalty, sampling.presence_penalty, sampling.stop, sampling.stop_ids) == (0, 0, (), ())
    assert sampling.seed == job.seed
    assert (job.request.stream, job.request.timeout, job.request.return_usage) == (None, 300, False)
    assert prepared(server, text="count").request.req_id != job.request.req_id
    assert prepared(server, text="count").seed != job.seed


def test_every_field_reaches_the_sampling(server):
    sampling = prepared(
        server,
        text="count",
        max_dec_len=30,
        min_dec_len=4,
        topp=0.5,
        top_k=9,
        temperature=0.25,
        penalty_score=1.25,
        frequency_score=0.5,
        presence_score=-0.5,
        eos_token_ids=[7],
        stop_sequences=["a", "b"],
        infer_seed=11,
    ).sampling
    assert (sampling.max_new_tokens, sampling.min_new_tokens, sampling.top_p, sampling.top_k) == (30, 4, 0.5, 9)
    assert (sampling.temperature, sampling.repetition_penalty, sampling.seed) == (0.25, 1.25, 11)
    assert (sampling.frequency_penalty, sampling.presence_penalty) == (0.5, -0.5)
    assert (sampling.stop_ids, sampling.stop) == ((7,), ("a", "b"))


def test_names_that_mean_the_same(server):
    for name in ("max_dec_len", "seq_len", "max_tokens"):
        assert prepared(server, text="a", **{name: 9}).sampling.max_new_tokens == 9
    for name in ("topp", "top_p"):
        assert prepared(server, text="a", **{name: 0.25}).sampling.top_p == 0.25
        assert prepared(server, text="a", **{name: 0}).sampling.greedy
    for name in ("seed", "infer_seed"):
        assert prepared(server, text="a", **{name: 0}).seed == 0
    assert prepared(server, text="a", eos_token_ids=7).sampling.stop_ids == (7,)
    assert prepared(server, text="a", eos_token_ids=[None]).sampling.stop_ids == ()
    assert prepared(server, text="a", topp=None, messages=None).sampling.top_p == 0.7


def test_prompts(server):
    tokenizer = server.service.tokenizer
    user = {"role": "user", "content": "count"}
    system = {"role": "system", "content": "Be short."}
    plain, told = tokenizer.encode_chat([user], None, True), tokenizer.encode_chat([system, user], None, True)
    assert plain != told
    assert prepared(server, text="count").ids == prepared(server, messages=[user]).ids == plain
    assert prepared(server, text="count", system="Be short.").ids == told
    assert prepared(server, messages=[user], system="Be short.").ids == told
    assert prepared(server, input_ids=[1, 2, 3]).ids == [1, 2, 3]
    assert server.call(prepare(server.service, parse({"text": "count"}), raw=True)).ids == tokenizer.encode("count")


def test_prompts_that_are_too_long(server):
    context = server.service.worker.engine.context_length
    ids = [index % 1000 for index in range(2 * context)]
    assert prepared(server, input_ids=ids, max_dec_len=50).ids == ids[-(context - 50) :]
    job = prepared(server, input_ids=ids)
    assert job.ids == ids[-(context - context // 4) :]
    assert job.sampling.max_new_tokens == context // 4
    # What fits is not cut, however little room it leaves.
    fits = ids[: context - 2]
    job = prepared(server, input_ids=fits)
    assert (job.ids, job.sampling.max_new_tokens) == (fits, 2)
    job = prepared(server, input_ids=fits, max_dec_len=50, enable_text_truncate=0)
    assert (job.ids, job.sampling.max_new_tokens) == (fits, 2)
    for fields, message in (
        ({"input_ids": ids}, "leaves no room for an answer"),
        ({"input_ids": fits, "min_dec_len": 3}, "min_dec_len"),
    ):
        with pytest.raises(ApiError) as raised:
            prepared(server, **fields, enable_text_truncate=False)
        assert message in raised.value.message


WRONG = [
    ({}, "give one of text, input_ids and messages"),
    ({"text": "a", "input_ids": [1]}, "text and input_ids are given"),
    ({"text": ""}, "at least 1 character"),
    ({"text": 5}, "valid string"),
    ({"text": ["a"]}, "valid string"),
    ({"input_ids": []}, "at least 1 item"),
    ({"input_ids": ["1"]}, "input_ids.0: Input should be a valid integer"),
    ({"input_ids": [1.5]}, "input_ids.0"),
    ({"input_ids": [True]}, "input_ids.0"),
    ({"input_ids": [-1]}, "outside the model's vocabulary"),
    ({"input_ids": [10**30]}, "outside the model's vocabulary"),
    ({"messages": []}, "at least 1 item"),
    ({"messages": [{"content": "a"}]}, "messages.0.role"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
    ({"messages": [{"role": "system", "content": "a"}], "system": "b"}, "begin with a system message"),
    ({"input_ids": [1], "system": "b"}, "no place beside input_ids"),
    ({"text": "a", "max_dec_len": 0}, "max_dec_len"),
    ({"text": "a", "max_dec_len": 101}, "over the limit: this server gives at most 100"),
    ({"text": "a", "max_dec_len": 1e3}, "max_dec_len"),
    ({"text": "a", "max_dec_len": 9, "seq_len": 9}, "mean the same"),
    ({"text": "a", "min_dec_len": 0}, "min_dec_len"),
    ({"text": "a", "min_dec_len": 9, "max_dec_len": 8}, "min_dec_len 9 is more than the 8"),
    ({"text": "a", "topp": 1.1}, "topp"),
    ({"text": "a", "topp": 0.5, "top_p": 0.5}, "mean the same"),
    ({"text": "a", "top_k": -1}, "top_k"),
    ({"text": "a", "temperature": -1}, "temperature"),
    ({"text": "a", "temperature": True}, "temperature"),
    ({"text": "a", "penalty_score": 0}, "penalty_score"),
    ({"text": "a", "frequency_score": 3}, "frequency_score"),
    ({"text": "a", "presence_score": "0"}, "presence_score"),
    ({"text": "a", "eos_token_ids": [1, 2]}, "eos_token_ids"),
    ({"text": "a", "eos_token_ids": [-2]}, "stop_ids"),
    ({"text": "a", "stop_sequences": [""]}, "stop_sequences.0"),
    ({"text": "a", "stop_sequences": "a"}, "stop_sequences"),
    ({"text": "a", "infer_seed": 1, "seed": 1}, "mean the same"),
    ({"text": "a", "seed": 2**63}, "seed"),
    ({"text": "a", "stream": 1}, "stream"),
    ({"text": "a", "timeout": 0}, "timeout"),
    ({"text": "a", "return_usage": "yes"}, "return_usage"),
    ({"text": "a", "enable_text_truncate": 2}, "enable_text_truncate"),
    ({"text": "a", "req_id": ""}, "req_id"),
    ({"text": "a", "req_id": 5}, "req_id"),
    ({"text": "a", "req_id": "x" * 257}, "req_id"),
    ({"text": "a", "response_type": "xml"}, "response_type"),
    ({"text": "a", "model": "another"}, "there is no model 'another'"),
    ({"text": "a", "num_beams": 2}, "num_beams: there is no such field"),
    ({"text": "a", "x" * 5000: 2}, "there is no such field"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG)
@pytest.mark.parametrize("stream", [False, True])
def test_wrong_requests(ask, fields, message, stream):
    answer = ask(**{"stream": stream, "req_id": "mine", **fields})
    assert answer.status_code in (400, 404)
    told = answer.json()
    assert message in told["error_msg"] and len(told["error_msg"]) < 300
    assert (told["error_code"], told["result"]) == (400, "")
    assert (
        told.get("req_id") == fields.get("req_id", "mine")
        or not isinstance(fields["req_id"], str)
        or (len(fields["req_id"]) != 4)
    )


@pytest.mark.parametrize("text", ['{"text": "\\ud800"}', '{"text": "a", "temperature": NaN}', "[]", "5", "null", '"a"'])
def test_json_that_is_no_request(server, text):
    answer = httpx.post(f"http://{server.http}/v1/chat/completions", content=text)
    assert (answer.status_code, answer.json()["error_code"]) == (400, 400)


def test_one_reply(ask):
    answer = ask(text="count", topp=0, req_id="mine")
    expected = {"result": TEXT, "error_msg": "", "error_code": 0, "req_id": "mine", "finish_reason": "stop"}
    assert answer.json() == expected
    answer = ask(text="count", topp=0, req_id="mine", return_usage=True, max_dec_len=3, return_all_tokens=True).json()
    assert (answer["result"], answer["finish_reason"]) == (TEXT[:3], "length")
    assert answer["usage"]["completion_tokens"] == len(answer["tokens_all_ids"]) == 3
    assert ask(text="count", topp=0, stop_sequences=["ZQ"]).json()["result"] == "zqxjkvbw"
    assert ask(text="count", topp=0, model="tiny").json()["result"] == TEXT


def test_an_eos_token_of_the_clients(server, ask):
    token = server.service.tokenizer.encode(TEXT)[4]
    *_, last = lines(ask(text="count", topp=0, eos_token_ids=[token], stream=True))
    assert (last["tokens_all"], last["tokens_all_num"], last["token_ids"]) == (TEXT[:4], 5, [])


def lines(answer):
    assert answer.status_code == 200, answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


def test_a_stream(ask):
    answer = ask(text="count", topp=0, stream=True, req_id="mine")
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    *parts, last = lines(answer)
    assert "".join(part["token"] for part in (*parts, last)) == last["tokens_all"] == TEXT
    names = {
        "token",
        "is_end",
        "send_idx",
        "req_id",
        "token_ids",
        "tokens_all_num",
        "inference_time_cost",
        "infer_seed",
    }
    assert all(set(part) == names | {"error_msg", "error_code"} for part in parts)
    assert set(last) - set(parts[0]) == {"tokens_all", "tokens_all_ids", "usage", "finish_reason"}
    costs = [part["inference_time_cost"] for part in parts]
    assert costs == sorted(costs) and costs[0] > 0
    [all_at_once] = lines(ask(text="count", topp=0, stream=True, return_all_tokens=True))
    assert all_at_once["token"] == TEXT


def test_times_for_benchmarks(ask):
    *_, last = lines(ask(text="count", topp=0, stream=True, benchmark=True))
    times = ["http_received_time", "preprocess_start_time", "preprocess_end_time", "schedule_start_time"]
    stamps = [last[name] for name in (*times, "inference_current_step_time")]
    assert stamps == sorted(stamps)
    assert "http_received_time" in ask(text="count", topp=0, benchmark=True).json()


def test_answers_in_the_form_of_openai(ask):
    answer = ask(text="count", topp=0, response_type="openai", req_id="mine").json()
    assert (answer["object"], answer["id"], answer["model"]) == ("chat.completion", "mine", "tiny")
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": TEXT}
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] + answer["usage"]["completion_tokens"]
    sent = ask(text="count", topp=0, response_type="OpenAI", stream=True, return_usage=True).text.split("\n\n")
    *events, done, rest = sent
    assert (done, rest) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == TEXT
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "usage" in chunks[-1]


def test_the_same_seed_gives_the_same_answer(ask):
    said = [
        ask(text="count", temperature=50, topp=1, infer_seed=seed, max_dec_len=20).json()["result"]
        for seed in (1, 1, 2)
    ]
    assert said[0] == said[1] != said[2]


@pytest.fixture(scope="module")
def endless(chain_model):
    model = chain_model("one two three", end=False, max_position_embeddings=65536)
    limits = Limits(max_new_tokens=60_000)
    options = {"num_threads": 1, "batch_size": 1, "num_pages": 4000, "block_size": 16}
    with running(model, limits=limits, max_waiting=0, more=chat_route, **options) as found:
        yield found


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves(endless, stream):
    free = endless.free_pages()
    url = f"http://{endless.http}/v1/chat/completions"
    sent = {"text": "count", "topp": 0, "stream": stream, "req_id": "left"}
    if stream:
        with httpx.stream("POST", url, json=sent, timeout=30) as answer:
            # How far the answer is by now is not known: so small a model is fast.
            assert json.loads(next(answer.iter_lines()))["is_end"] == 0, answer.status_code
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url, json=sent, timeout=0.3)
    endless.wait_idle(10)
    assert endless.free_pages() == free
    # The name is free as well.
    assert httpx.post(url, json={**sent, "max_dec_len": 3, "stream": False}).json()["error_code"] == 0


def test_too_late_busy_and_taken(endless):
    url = f"http://{endless.http}/v1/chat/completions"
    sent = {"text": "count", "topp": 0, "req_id": "mine", "timeout": 3}
    late = httpx.post(url, json={**sent, "timeout": 0.05})
    assert (late.status_code, late.json()["error_code"]) == (504, 501)
    assert "more than 0.05 seconds" in late.json()["error_msg"]
    found = []
    thread = threading.Thread(target=lambda: found.append(httpx.post(url, json={**sent, "stream": True})))
    thread.start()
    while endless.service.worker.num_open == 0:
        time.sleep(0.005)
    taken, busy = httpx.post(url, json=sent), httpx.post(url, json={**sent, "req_id": "other"})
    assert (taken.status_code, "not finished yet" in taken.json()["error_msg"]) == (400, True)
    assert (busy.status_code, busy.json()["error_code"], busy.headers["retry-after"]) == (429, 500, "1")
    assert httpx.get(f"http://{endless.http}/v2/health/ready").status_code == 503
    assert httpx.get(f"http://{endless.http}/v2/health/live").status_code == 200
    thread.join()
    # What is on its way ends with the error in its last line.
    *parts, last = lines(found[0])
    assert len(parts) > 2
    assert (last["error_code"], last["is_end"], last["req_id"]) == (501, 1, "mine")
    endless.wait_idle()


def test_the_engine_dies(chain_model):
    """Health says so, and requests are told, those that are open and those that come."""
    with running(chain_model("one two", end=False), more=chat_route, num_threads=1) as server:
        base = f"http://{server.http}"
        assert httpx.get(f"{base}/v2/health/live").status_code == 200
        server.service.worker._commands.put(server.service.worker._stop)
        server.service.worker._thread.join(10)
        for path in ("live", "ready"):
            assert httpx.get(f"{base}/v2/health/{path}").status_code == 503
        assert httpx.get(f"{base}/v2/models/model/ready").status_code == 503
        assert httpx.post(f"{base}/v2/repository/index", json={"ready": True}).json() == []
        assert httpx.post(f"{base}/v2/repository/index").json()[0]["state"] == "UNAVAILABLE"
        answer = httpx.post(f"{base}/v1/chat/completions", json={"text": "a"})
        assert (answer.status_code, answer.json()["error_code"]) == (503, 500)
