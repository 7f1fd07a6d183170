"""What every request passes: ids, keys, sizes, errors, CORS; and what is measured on the way."""

import asyncio
import functools
import http.client
import io
import json
import socket
import time

import httpx
import pytest
from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from oarsmith.engine import Sampling
from oarsmith.serve import gate, health, metrics
from oarsmith.serve.access_log import AccessLog
from oarsmith.serve.keys import Keys, new_key

pytestmark = pytest.mark.usefixtures("few_threads")
LIMIT = 4096


def some_routes(service):
    found = APIRouter()

    @found.post("/echo")
    async def echo(request: Request):
        return {"size": len(await request.body())}

    @found.get("/fault")
    async def fault():
        raise RuntimeError("the secret of /etc/somewhere")

    @found.post("/say")
    async def say(request: Request):
        answer = service.ask(
            await service.encode([{"role": "user", "content": (await request.json())["text"]}]),
            Sampling(max_new_tokens=20),
        )
        try:
            return {"text": (await answer.completion()).text}
        finally:
            answer.close()

    @found.get("/slow/{name}")
    async def slow(name: str):
        async def parts():
            for _ in range(3):
                yield b"part\n"
                await asyncio.sleep(0.3)

        return StreamingResponse(parts())

    return found


class Setting:
    """A server with everything, and what it wrote."""

    def __init__(self, served, keys):
        self.url, self.log, self.port = served.url, served.log, int(served.url.rpartition(":")[2])
        self.keys = keys

    def get(self, path, **headers):
        return httpx.get(self.url + path, headers=headers)


@pytest.fixture(scope="module")
def setting(served, chain_model, tmp_path_factory):
    made = {name: new_key(name) for name in ("anna", "rare", "busy")}
    file = tmp_path_factory.mktemp("keys") / "keys.txt"
    limits = {"anna": "", "rare": " requests_per_minute=2", "busy": " tokens_per_minute=1"}
    file.write_text("".join(f"{line}{limits[name]}\n" for name, (_, line) in made.items()))
    log = io.StringIO()

    def wrap(app, service):
        measured = metrics.Metrics(service)
        app.include_router(metrics.router(measured))
        rules = gate.Rules(max_body_bytes=LIMIT, body_seconds=1.0, cors_origins=("https://page.example",))
        written = AccessLog(service, prompts=True, to=log)
        return functools.partial(gate.guarded, rules=rules, keys=Keys(file), metrics=measured, log=written)(app)

    with served(chain_model("one two three"), [health.router, some_routes], wrap=wrap) as found:
        found.log = log
        yield Setting(found, {name: {"Authorization": f"Bearer {key}"} for name, (key, _) in made.items()})


def test_probes_need_no_key(setting):
    for path, body in (("/health", {"status": "alive"}), ("/ready", {"status": "ready"})):
        answer = setting.get(path)
        assert (answer.status_code, answer.json()) == (200, body)
    assert setting.get("/version").status_code == 200
    assert setting.get("/metrics").status_code == 200


@pytest.mark.parametrize("value", [None, "Bearer", "Bearer wrong", "Basic YTpi", "wrong"])
@pytest.mark.parametrize("path", ["/echo", "/nowhere", "/health/../echo", "/openapi.json"])
def test_everything_else_does(setting, value, path):
    answer = setting.get(path, **({} if value is None else {"Authorization": value}))
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"].startswith("Bearer")
    assert answer.json()["error"]["type"] == "authentication_error"


def test_rates_of_a_key(setting):
    for status in (200, 200, 429):
        answer = httpx.post(setting.url + "/echo", content=b"a", headers=setting.keys["rare"])
        assert answer.status_code == status
    assert 1 <= int(answer.headers["Retry-After"]) <= 31
    say = functools.partial(httpx.post, setting.url + "/say", json={"text": "hi"}, headers=setting.keys["busy"])
    assert [say().status_code, say().status_code] == [200, 429]


def test_request_ids(setting):
    assert setting.get("/health", **{"X-Request-Id": "mine-1"}).headers["X-Request-Id"] == "mine-1"
    for wrong in ("a b", "x" * 200, '"}{'):
        given = setting.get("/health", **{"X-Request-Id": wrong}).headers["X-Request-Id"]
        assert given != wrong and len(given) == 32


def test_a_body_may_be_so_large(setting):
    post = functools.partial(httpx.post, setting.url + "/echo", headers=setting.keys["anna"])
    assert post(content=b"a" * LIMIT).json() == {"size": LIMIT}
    assert post(content=b"a" * (LIMIT + 1)).status_code == 413
    assert post(content=iter([b"a" * 1024] * 4)).json() == {"size": LIMIT}
    answer = post(content=iter([b"a" * 1024] * 5))
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "request_too_large"


def test_a_body_without_end_is_not_kept(setting):
    connection = http.client.HTTPConnection("127.0.0.1", setting.port, timeout=10)
    connection.putrequest("POST", "/echo")
    connection.putheader("Transfer-Encoding", "chunked")
    connection.putheader("Authorization", setting.keys["anna"]["Authorization"])
    connection.endheaders()
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        for _ in range(100_000):
            connection.send(b"400\r\n" + b"a" * 1024 + b"\r\n")


def test_a_body_that_does_not_come(setting):
    key = setting.keys["anna"]["Authorization"]
    with socket.create_connection(("127.0.0.1", setting.port), timeout=10) as client:
        client.sendall(f"POST /echo HTTP/1.1\r\nHost: a\r\nAuthorization: {key}\r\nContent-Length: 9\r\n\r\na".encode())
        began = time.monotonic()
        assert client.recv(100).startswith(b"HTTP/1.1 408")
        assert time.monotonic() - began < 5


def test_a_bug_says_nothing_of_the_inside(setting):
    answer = setting.get("/fault", **setting.keys["anna"], **{"X-Request-Id": "bug-1"})
    assert answer.status_code == 500
    assert "bug-1" in answer.json()["error"]["message"]
    assert "secret" not in answer.text and "Traceback" not in answer.text and "/" not in answer.text


def test_headers_and_what_is_not_there(setting):
    answer = setting.get("/nowhere", **setting.keys["anna"])
    assert answer.status_code == 404 and "error" in answer.json()
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert "server" not in answer.headers or "uvicorn" in answer.headers["server"]
    assert setting.get("/docs", **setting.keys["anna"]).status_code == 404
    assert setting.get("/echo", **setting.keys["anna"]).status_code == 405


def test_streams_come_as_they_are_made(setting):
    with httpx.stream("GET", setting.url + "/slow/a", headers=setting.keys["anna"]) as answer:
        times = [time.monotonic() for _ in answer.iter_bytes()]
    assert times[-1] - times[0] > 0.4


def test_cors_for_the_pages_that_are_named(setting):
    def ask(origin):
        headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        return httpx.options(setting.url + "/echo", headers=headers)

    assert ask("https://page.example").headers["access-control-allow-origin"] == "https://page.example"
    assert "access-control-allow-origin" not in ask("https://other.example").headers
    refused = setting.get("/echo", Origin="https://page.example")
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://page.example")


def test_cors_is_off_by_default(served, chain_model):
    with served(chain_model("one"), [health.router], wrap=lambda app, _: gate.guarded(app)) as found:
        answer = httpx.get(found.url + "/health", headers={"Origin": "https://page.example"})
        assert answer.status_code == 200
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_what_is_measured_and_logged(setting):
    headers = {**setting.keys["anna"], "X-Request-Id": "log-1"}
    assert httpx.post(setting.url + "/say", json={"text": "count"}, headers=headers).json() == {"text": "one two three"}
    setting.get("/slow/b", **setting.keys["anna"])
    text = setting.get("/metrics").text
    values = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            values[name] = float(value)
    assert values['oarsmith_answers_total{ending="stop",model="tiny"}'] >= 1
    assert values['oarsmith_time_to_first_token_seconds_count{model="tiny"}'] >= 1
    assert values['oarsmith_request_seconds_count{model="tiny"}'] >= 1
    assert values['oarsmith_http_requests_total{endpoint="/slow/{name}",method="GET",status="200"}'] >= 1
    for name in ("oarsmith_requests_waiting", "batch_size", "block_num"):
        assert values[name] == 0
    assert values["max_batch_size"] == 4 and values["max_block_num"] > 0 and values["available_resource"] == 1
    [line] = [json.loads(one) for one in setting.log.getvalue().splitlines() if "log-1" in one]
    assert (line["method"], line["path"], line["status"], line["key"]) == ("POST", "/say", 200, "anna")
    assert line["generated_tokens"] > 3 and line["answers"] == ["one two three"] and "count" in line["prompts"][0]
    assert setting.keys["anna"]["Authorization"].split()[1] not in setting.log.getvalue()


def test_the_log_has_no_prompts_by_default(served, chain_model):
    log = io.StringIO()
    wrap = lambda app, service: gate.guarded(app, log=AccessLog(service, to=log))  # noqa: E731
    with served(chain_model("one two"), [some_routes], wrap=wrap) as found:
        httpx.post(found.url + "/say", json={"text": "count"})
    line = json.loads(log.getvalue())
    assert line["generated_tokens"] > 1
    assert not {"prompts", "answers"} & set(line)
