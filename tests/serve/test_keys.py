"""API keys: their file, and how much each may."""

import hashlib
import json

import pytest

from oarsmith.errors import ConfigError
from oarsmith.serve import callers
from oarsmith.serve.callers import Bucket, Caller, LimitError
from oarsmith.serve.errors import ApiError
from oarsmith.serve.keys import Keys, new_key


def hash_of(key):
    return "sha256:" + hashlib.sha256(key.encode()).hexdigest()


def test_a_new_key_opens_and_is_not_in_its_line(tmp_path):
    key, line = new_key("anna")
    (tmp_path / "keys.txt").write_text(f"# who may\n\n{line} concurrency=2 requests_per_minute=60\n")
    holder = Keys(tmp_path / "keys.txt").holder(key)
    assert (holder.name, holder.concurrency, holder.requests_per_minute) == ("anna", 2, 60)
    assert key not in line and key.removeprefix("sk-") not in line
    assert len(key) > 40 and new_key("anna")[0] != key


@pytest.mark.parametrize("name", ["k.json", "k.yaml"])
def test_lists(tmp_path, name):
    (tmp_path / name).write_text(json.dumps([{"name": "a", "hash": hash_of("one"), "tokens_per_minute": 5}]))
    assert Keys(tmp_path / name).holder("one").tokens_per_minute == 5


@pytest.mark.parametrize("token", [None, "", "two", "one ", "\udcff", "ä" * 10_000])
def test_what_is_no_key(tmp_path, token):
    (tmp_path / "k").write_text(f"a {hash_of('one')}")
    with pytest.raises(ApiError) as raised:
        Keys(tmp_path / "k").check(token)
    assert raised.value.status == 401
    assert raised.value.headers["WWW-Authenticate"].startswith("Bearer")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no keys"),
        ("anna sk-secret", "no hash"),
        ("anna", "no hash"),
        (f"a/b {hash_of('x')}", "no key"),
        (f"a {hash_of('x')} speed=3", "no key"),
        (f"a {hash_of('x')} concurrency=0", "above 0"),
        (f"a {hash_of('x')} concurrency=many", "above 0"),
        (f"a {hash_of('x')}\na {hash_of('y')}", "two keys are named"),
    ],
)
def test_files_that_are_refused(tmp_path, text, message):
    (tmp_path / "k").write_text(text)
    with pytest.raises(ConfigError, match=message) as raised:
        Keys(tmp_path / "k")
    assert "sk-secret" not in str(raised.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        Keys(tmp_path / "none")


def test_reload(tmp_path, caplog):
    (tmp_path / "k").write_text(f"a {hash_of('one')} concurrency=1")
    keys = Keys(tmp_path / "k")
    keys.holder("one").open()
    (tmp_path / "k").write_text(f"a {hash_of('two')} concurrency=1")
    keys.reload()
    with pytest.raises(ApiError):
        keys.holder("one")
    with pytest.raises(LimitError):  # what was open still is
        keys.holder("two").open()
    (tmp_path / "k").write_text("nonsense")
    keys.reload()
    assert keys.holder("two").name == "a" and "stay as they were" in caplog.text


def test_rates(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(callers.time, "monotonic", lambda: now[0])
    caller = Caller("a", requests_per_minute=2, tokens_per_minute=60)
    caller.ask()
    caller.ask()
    with pytest.raises(LimitError) as raised:
        caller.ask()
    assert 30 <= raised.value.seconds <= 31
    now[0] += 30.0
    caller.ask()
    caller.open()
    caller.close(120)  # twice as many tokens as a minute has
    now[0] += 31.0
    with pytest.raises(LimitError, match="60 tokens") as raised:
        caller.ask()
    assert 28 <= raised.value.seconds <= 33
    now[0] += 33.0
    caller.ask()


def test_a_bucket_never_holds_more_than_a_minute(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(callers.time, "monotonic", lambda: now[0])
    bucket = Bucket(10)
    now[0] = 10_000.0
    assert bucket.wait(10) == 0
    bucket.take(10)
    assert bucket.wait(1) == pytest.approx(6.0)
