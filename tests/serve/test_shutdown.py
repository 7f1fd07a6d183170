"""The command as a process: it starts, answers, and ends in good order."""

import json
import re
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from oarsmith import cli
from oarsmith.serve.keys import new_key
from server_process import server_process


def ask(url, tokens=200, **more):
    body = {"messages": [{"role": "user", "content": "count"}], "max_tokens": tokens, "temperature": 0, **more}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)


def wait_for_open(url, num_requests):
    while f"oarsmith_requests_open {num_requests}.0" not in httpx.get(f"{url}/metrics").text:
        time.sleep(0.01)


@pytest.fixture(scope="module")
def endless(chain_model):
    return chain_model("one two three", end=False, max_position_embeddings=8192)


def test_sigterm_under_load_every_accepted_request_is_answered(endless):
    with server_process(endless, "--batch_size", 4, "--grace_seconds", 60) as (server, url, lines):
        assert httpx.get(f"{url}/ready").status_code == 200
        with ThreadPoolExecutor(20) as pool, httpx.Client() as kept:
            asked = [pool.submit(ask, url, 400) for _ in range(16)]
            metrics = ""
            while not re.search(r"oarsmith_requests_open 16\.0", metrics):
                metrics = kept.get(f"{url}/metrics").text
            server.send_signal(signal.SIGTERM)
            refused = ask(url)
            assert refused.status_code == 503 and "Retry-After" in refused.headers
            assert kept.get(f"{url}/ready").json() == {"status": "ending"}
            assert kept.get(f"{url}/health").status_code == 200
            answers = [one.result() for one in asked]
        assert [answer.status_code for answer in answers] == [200] * 16
        assert {answer.json()["usage"]["completion_tokens"] for answer in answers} == {400}
        assert server.wait(20) == 0
    told = [json.loads(line) for line in lines if line.startswith("{")]
    assert len([line for line in told if line.get("generated_tokens") == 400]) == 16
    assert not [line for line in told if "prompts" in line]


def test_what_is_not_finished_within_the_grace_gets_an_error(endless):
    with (
        server_process(endless, "--grace_seconds", 0.3, slowly=True) as (server, url, _),
        ThreadPoolExecutor(4) as pool,
    ):
        asked = [pool.submit(ask, url, 4000) for _ in range(3)]
        wait_for_open(url, 3)
        server.send_signal(signal.SIGTERM)
        assert {one.result().status_code for one in asked} == {503}
        assert server.wait(20) == 0


def test_a_second_signal_ends_it_at_once(endless):
    with server_process(endless, "--grace_seconds", 60, slowly=True) as (server, url, _), ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, url, 4000)
        wait_for_open(url, 1)
        server.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        server.send_signal(signal.SIGTERM)
        assert server.wait(5) == 143
        assert isinstance(asked.exception(), httpx.HTTPError)


def test_a_dead_engine_ends_the_process_and_answers_everybody(endless, tmp_path):
    broken = tmp_path / "broken"
    with server_process(endless, slowly=True, breaking=broken) as (server, url, lines), ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, url, 4000) for _ in range(8)]
        wait_for_open(url, 8)
        broken.touch()
        answers = [one.result() for one in asked]
        assert {answer.status_code for answer in answers} == {503}
        assert not [answer for answer in answers if "bug of the engine" in answer.text or "/" in answer.text]
        assert server.wait(20) == 1
    assert any("a bug of the engine" in line for line in lines)


def test_keys_are_read_again_at_sighup(endless, tmp_path):
    (first, line), (second, other) = new_key("a"), new_key("b")
    file = tmp_path / "keys.txt"
    file.write_text(line)
    with server_process(endless, "--api_keys", file) as (server, url, _):
        get = lambda key: httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"})  # noqa: E731
        assert (get(first).status_code, get(second).status_code) == (200, 401)
        file.write_text(other)
        server.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        assert (get(first).status_code, get(second).status_code) == (401, 200)


def test_one_error_before_anything_is_loaded(capsys, tmp_path, endless):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        cases = [
            ([endless, "--port", port], f"127.0.0.1:{port} cannot be had"),
            (["--port", 0], "no model is given"),
            ([tmp_path / "none", "--port", 0], "none"),
            ([endless, "--port", 0, "--api_keys", tmp_path / "none"], "cannot be read"),
            ([endless, "--port", 0, "--tls_certfile", tmp_path / "none"], "TLS needs both"),
            ([endless, "--port", 0, "--tls_certfile", "a", "--tls_keyfile", "b"], "certificate cannot be used"),
            ([endless, "--adapters", "a"], "NAME=DIR"),
            ([endless, "--replicas", 2, "--ui_port", 1], "one engine only"),
        ]
        for words, message in cases:
            assert cli.main(["serve", *map(str, words)]) == cli.EXIT_BAD_INPUT
            printed = capsys.readouterr().err
            assert message in printed and "Traceback" not in printed


def test_a_new_key_is_printed_once(capsys):
    assert cli.main(["serve", "--new_api_key", "anna"]) == 0
    printed = capsys.readouterr()
    assert re.fullmatch(r"anna sha256:[0-9a-f]{64}\n", printed.out)
    assert "sk-" in printed.err
