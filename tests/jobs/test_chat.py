"""``oarsmith chat``: piped lines, a real terminal, and a history that fits the context."""

import io
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

import oarsmith
from oarsmith import cli
from oarsmith.engine import Engine
from oarsmith.jobs.chat import History

pytestmark = pytest.mark.usefixtures("few_threads")


def chat(monkeypatch, capsys, model, lines, *words):
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    status = cli.main(["chat", str(model), *words])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_piped_lines_are_answered_one_by_one(chain_model, monkeypatch, capsys):
    model = chain_model("one two")
    status, out, err = chat(monkeypatch, capsys, model, ["hello", "", "again"])
    assert (status, out, err) == (0, "one two\n" * 2, "")


def test_commands(chain_model, monkeypatch, capsys):
    lines = ["/system Be brief.", "hello", "/reset", "/nonsense", "/help", "/etc/hosts is what?", "/quit", "never"]
    status, out, err = chat(monkeypatch, capsys, chain_model("one two"), lines)
    assert (status, out) == (0, "one two\n" * 2)
    for said in ("system message set", "forgotten", "no command /nonsense", "/system TEXT"):
        assert said in err


def test_a_full_context_forgets_the_oldest_turns(chain_model, monkeypatch, capsys):
    model = chain_model("one two", max_position_embeddings=128)
    lines = ["some words " * 4] * 4
    status, out, err = chat(monkeypatch, capsys, model, lines, "--max_new_tokens", "20")
    assert (status, out) == (0, "one two\n" * 4)
    assert "the oldest 1 turns are forgotten" in err


def test_a_message_that_cannot_fit_is_an_error(chain_model, monkeypatch, capsys):
    status, _, err = chat(monkeypatch, capsys, chain_model("one two"), ["some words " * 300])
    assert status == cli.EXIT_BAD_INPUT
    assert "leaves no room for an answer" in err


def test_history_keeps_the_last_message_and_the_system_message(chain_model):
    engine = Engine(chain_model("one two", max_position_embeddings=128))
    history = History("Be brief.")
    for number in range(6):
        history.messages += [
            {"role": "user", "content": f"question number {number}"},
            {"role": "assistant", "content": f"answer number {number}"},
        ]
    history.messages.append({"role": "user", "content": "the last one"})
    dropped = history.fit(engine, max_new_tokens=20)
    rendered = history.rendered()
    assert 0 < dropped < 6
    assert rendered[0] == {"role": "system", "content": "Be brief."}
    assert rendered[1]["content"] == f"question number {dropped}"
    assert rendered[-1]["content"] == "the last one"
    assert len(engine.encode(rendered)) + 20 <= 128
    assert history.fit(engine, max_new_tokens=20) == 0


@pytest.mark.parametrize("words", [["--raw"], ["--chat_template", "none"]])
def test_a_conversation_needs_a_template(chain_model, monkeypatch, capsys, words):
    status, _, err = chat(monkeypatch, capsys, chain_model("one"), ["hello"], *words)
    assert status == cli.EXIT_BAD_INPUT
    assert "a conversation needs a chat template" in err


class Terminal:
    """A process on a pseudo-terminal."""

    def __init__(self, *words):
        self.master, slave = pty.openpty()
        environment = {**os.environ, "PYTHONPATH": str(Path(oarsmith.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "oarsmith", *words],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**environment, "TERM": "xterm"},
            start_new_session=True,
            preexec_fn=_own_terminal,
        )
        os.close(slave)
        self.seen = b""

    def shows(self, text, seconds):
        """Read until ``text`` shows up; False when it does not. What stands before it is not looked at again."""
        end = time.monotonic() + seconds
        while text.encode() not in self.seen:
            ready, _, _ = select.select([self.master], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                return False
            self.seen += os.read(self.master, 4096)
        self.seen = self.seen.partition(text.encode())[2]
        return True

    def wait_for(self, text):
        assert self.shows(text, 60), f"{text!r} did not appear in {self.seen.decode(errors='replace')!r}"

    def send(self, text):
        os.write(self.master, text.encode())


def _own_terminal():
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_a_terminal_session(chain_model):
    """Streamed answer, Ctrl-C stops one that would not end, Ctrl-D ends the chat."""
    endless = chain_model("one two", end=False, max_position_embeddings=1_000_000)
    terminal = Terminal("chat", str(endless), "--max_new_tokens", "500000")
    try:
        terminal.wait_for("you> ")
        terminal.send("hello\n")
        terminal.wait_for("one two")
        terminal.send("\x03")
        terminal.wait_for("(stopped)")
        terminal.wait_for("you> ")
        # Python's readline loses a signal that comes between the prompt and its wait for a key.
        for _ in range(20):
            terminal.send("\x03")
            if terminal.shows("Ctrl-D or /quit ends", 2):
                break
        else:
            raise AssertionError("Ctrl-C at the prompt did nothing")
        terminal.wait_for("you> ")
        terminal.send("/help\n")
        terminal.wait_for("/system TEXT")
        terminal.wait_for("you> ")
        terminal.send("\x04")
        assert terminal.process.wait(timeout=30) == 0
    finally:
        if terminal.process.poll() is None:
            terminal.process.kill()
            terminal.process.wait()
        os.close(terminal.master)
