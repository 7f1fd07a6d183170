"""Every example of a client as it is, against the command itself."""

import hashlib
import os
import shutil
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest

from tiny import command, environment

CLIENTS = Path(__file__).parents[2] / "examples" / "clients"
TEXT = "one two three"
KEY = "a-key-for-the-clients-to-use"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def server(chain_model, tmp_path_factory):
    """Where it is, as the clients are told."""
    port, grpc_port = free_port(), free_port()
    folder = tmp_path_factory.mktemp("clients")
    keys, log = folder / "keys.txt", folder / "log.txt"
    keys.write_text(f"clients sha256:{hashlib.sha256(KEY.encode()).hexdigest()}\n")
    words = ["serve", str(chain_model(TEXT)), "--port", str(port), "--grpc_port", str(grpc_port), "--num_threads", "1"]
    words += ["--api_keys", str(keys)]
    with log.open("wb") as output:
        process = subprocess.Popen(command(words), env=environment(), stdout=output, stderr=subprocess.STDOUT)
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + 60
    try:
        while True:
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            try:
                if httpx.get(f"{url}/ready").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.1)
        yield {"OARSMITH_URL": url, "OARSMITH_GRPC": f"127.0.0.1:{grpc_port}", "OARSMITH_API_KEY": KEY}
    finally:
        process.terminate()
        assert process.wait(30) == 0


def run(words: list[str], where: dict[str, str]) -> subprocess.CompletedProcess:
    env = {**os.environ, **where, "NO_PROXY": "127.0.0.1"}
    return subprocess.run(words, capture_output=True, text=True, timeout=60, env=env, check=False)


def said(name: str, where: dict[str, str]) -> str:
    interpreter = ["bash"] if name.endswith(".sh") else [sys.executable]
    done = run([*interpreter, str(CLIENTS / name), 'say "it"'], where)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_openai(server):
    text, counts = said("openai_client.py", server).splitlines()
    assert text == TEXT and "tokens in" in counts


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl(server):
    lines = said("curl.sh", server)
    assert lines.count(TEXT) == 1, "the whole answer; the streamed one is in pieces"
    assert '"chat.completion.chunk"' in lines and lines.rstrip().endswith("data: [DONE]")


def test_triton_over_grpc(server):
    assert said("triton_client.py", server).strip() == TEXT


def test_triton_over_http(server):
    where = {name: value for name, value in server.items() if name != "OARSMITH_GRPC"}
    assert said("triton_client.py", where).strip() == TEXT


@pytest.mark.skipif(find_spec("langchain_openai") is None, reason="needs langchain-openai")
def test_langchain(server):
    assert said("langchain_client.py", server).strip() == TEXT


@pytest.mark.parametrize("name", ["openai_client.py", "triton_client.py", "curl.sh"])
def test_a_wrong_key_is_refused(server, name):
    interpreter = "bash" if name.endswith(".sh") else sys.executable
    done = run([interpreter, str(CLIENTS / name)], {**server, "OARSMITH_API_KEY": "wrong"})
    assert done.returncode != 0
