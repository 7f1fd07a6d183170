"""``oarsmith request`` against a real server."""

import pytest

from oarsmith import cli
from oarsmith.serve import gate, openai
from oarsmith.serve.keys import Keys, new_key

pytestmark = pytest.mark.usefixtures("few_threads")


@pytest.fixture(scope="module")
def server(served, chain_model, tmp_path_factory):
    key, line = new_key("anna")
    file = tmp_path_factory.mktemp("keys") / "keys.txt"
    file.write_text(line)
    wrap = lambda app, service: gate.guarded(app, keys=Keys(file))  # noqa: E731
    with served(chain_model("one two three"), [openai.router], wrap=wrap) as found:
        yield found.url, key


@pytest.mark.parametrize("stream", ["true", "false"])
def test_the_answer_is_on_stdout(server, capsys, stream):
    url, key = server
    words = ["request", "count", "--url", url, "--api_key", key, "--stream", stream, "--temperature", "0"]
    assert cli.main(words) == 0
    printed = capsys.readouterr()
    assert printed.out == "one two three\n"
    assert "tokens/s" in printed.err and printed.err.rstrip().endswith("stop")


def test_the_key_comes_from_the_environment(server, capsys, monkeypatch):
    url, key = server
    monkeypatch.setenv("OARSMITH_API_KEY", key)
    assert cli.main(["request", "count", "--url", f"{url}/v1/", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == "one two three\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--api_key", "wrong"], "HTTP 401"),
        (["--served_model_name", "another"], "HTTP 404"),
        (["--url", "http://127.0.0.1:1"], "nothing answers"),
        (["--url", "ftp://a"], "is no address"),
    ],
)
def test_what_goes_wrong_is_one_error(server, capsys, words, message):
    url, key = server
    given = [*(() if "--api_key" in words else ("--api_key", key)), *(() if "--url" in words else ("--url", url))]
    assert cli.main(["request", "count", *given, *words]) == cli.EXIT_BAD_INPUT
    printed = capsys.readouterr()
    assert message in printed.err and "Traceback" not in printed.err and key not in printed.err
