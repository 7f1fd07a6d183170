"""200 malformed bodies for every endpoint that takes one: each is refused with a message, and the server lives on."""

import random

import httpx
import pytest

from oarsmith.serve import gate, health, openai
from oarsmith.serve.kserve import http as kserve

pytestmark = pytest.mark.usefixtures("few_threads")
NUM_BODIES = 200
WRONG = [b"", b"{", b"[]", b"null", b"1", b'"a"', b"\xff\xfe", b"{}}", b"[" * 5000, b'{"a":' * 2000, b"NaN", b"\0" * 99]
PIECES = [b"{", b"}", b"[", b"]", b'"', b":", b",", b"null", b"1e999", b"\xc3", b'"model"', b'"messages"', b"\\u", b" "]


def bodies():
    """None of them is a JSON object."""
    draw = random.Random(3)
    yield from WRONG
    for _ in range(NUM_BODIES - len(WRONG)):
        yield b"{" + b"".join(draw.choices(PIECES, k=draw.randrange(1, 12))) + b"{"


def test_malformed_bodies(served, chain_model):
    routers = [health.router, openai.router, kserve.router]
    with served(chain_model("one two"), routers, wrap=lambda app, _: gate.guarded(app)) as found:
        document = httpx.get(f"{found.url}/openapi.json").json()
        paths = [path for path, methods in document["paths"].items() if "post" in methods]
        assert len(paths) > 5
        wrong = []
        with httpx.Client(base_url=found.url, headers={"Content-Type": "application/json"}) as client:
            for path in paths:
                # Names of models that exist, for others are refused before the body is read.
                place = path.replace("{model}", "tiny").replace("{name}", "tiny").replace("{version}", "1")
                for body in bodies():
                    if body == b"" and path == "/v2/repository/index":
                        continue  # its body is optional
                    answer = client.post(place, content=body)
                    told = answer.headers.get("content-type", "").startswith("application/json") and answer.json()
                    if not (400 <= answer.status_code < 500 and told and told.get("error")):
                        wrong.append((place, body[:60], answer.status_code, answer.text[:100]))
                    assert "Traceback" not in answer.text and "site-packages" not in answer.text
            assert not wrong, wrong[:20]
            assert client.get("/health").status_code == 200
        found.wait_idle()
