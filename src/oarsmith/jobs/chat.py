"""``oarsmith chat``: a conversation in the terminal; with piped input one turn a line, only the answers on stdout."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

from rich.console import Console

from oarsmith.config.inference import ChatConfig
from oarsmith.config.resolved import Resolved
from oarsmith.engine import Engine, Sampling
from oarsmith.errors import ConfigError, OarsmithError
from oarsmith.jobs.ask import answering, is_raw, open_engine, sampling_of, speed_line

HELP = """/reset         forget the conversation
/system TEXT   set the system message (without TEXT: remove it)
/help          this list
/quit          end (so does Ctrl-D); Ctrl-C stops an answer"""


def run(resolved: Resolved[ChatConfig]) -> int:
    """The command."""
    config = resolved.config
    if is_raw(config):
        raise ConfigError(
            "a conversation needs a chat template",
            where="raw" if config.raw else "chat_template",
            fix="remove it here, or use 'oarsmith generate --raw' to continue a text",
        )
    with answering(config):
        engine = open_engine(config)
        if engine.tokenizer is not None and engine.tokenizer.chat_template is None:
            raise ConfigError(
                "the model has no chat template",
                where=config.model_name_or_path,
                fix="name one: --chat_template chatml (or llama-3, mistral, gemma, or a file)",
            )
        history = History(config.system)
        sampling = sampling_of(config, config.seed)
        if sys.stdin.isatty():
            _talk(engine, sampling, history, config.stream)
        else:
            _answer_lines(engine, sampling, history)
    return 0


@dataclass
class History:
    """The conversation so far.

    Attributes:
        system: the system message.
        messages: user and assistant messages in turn; the last one is the user's while an answer is made.
        num_turns: turns ever taken; each has its own random numbers.
    """

    system: str | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    num_turns: int = 0

    def rendered(self) -> list[dict[str, Any]]:
        """What the model is given."""
        head = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*head, *self.messages]

    def fit(self, engine: Engine, max_new_tokens: int) -> int:
        """Drop the oldest turns until prompt and answer fit into the context; returns how many turns went.

        The last message stays: where it does not fit by itself, the engine says so.
        """
        dropped = 0
        while len(self.messages) > 1 and not self._fits(engine, max_new_tokens):
            del self.messages[:2]
            dropped += 1
        return dropped

    def _fits(self, engine: Engine, max_new_tokens: int) -> bool:
        assert engine.tokenizer is not None
        ids = engine.tokenizer.encode_chat(self.rendered(), None, True)
        # An answer may be short, but half of the context is the least a conversation should leave it.
        return len(ids) + min(max_new_tokens, engine.context_length // 2) <= engine.context_length


def _turn(
    engine: Engine, sampling: Sampling, history: History, text: str, notices: Console, *, speed: bool
) -> Generator[str, None, None]:
    """The pieces of the answer to ``text``. What was said enters the history, also when it is stopped halfway."""
    history.messages.append({"role": "user", "content": text})
    answer: list[str] = []
    complete = False
    try:
        dropped = history.fit(engine, sampling.max_new_tokens)
        if dropped:
            notices.print(f"(the context is full: the oldest {dropped} turns are forgotten)", style="dim")
        seed = None if sampling.seed is None else sampling.seed + history.num_turns
        history.num_turns += 1
        start = time.perf_counter()
        stream = engine.stream(history.rendered(), replace(sampling, seed=seed))
        for piece in stream:
            answer.append(piece)
            yield piece
        complete = True
        if speed and stream.completion is not None:
            notices.print(f"\n{speed_line(stream.completion, time.perf_counter() - start)}", style="dim", end="")
    finally:
        if answer or complete:
            history.messages.append({"role": "assistant", "content": "".join(answer)})
        else:
            history.messages.pop()


def _command(line: str, history: History, notices: Console) -> bool | None:
    """Carry out a line that is a command. True: done, False: end the chat, None: it is no command."""
    word, _, rest = line.partition(" ")
    match word:
        case "/quit" | "/exit":
            return False
        case "/reset":
            history.messages.clear()
            notices.print("(forgotten)", style="dim")
        case "/system":
            history.system = rest.strip() or None
            notices.print("(system message set)" if history.system else "(no system message)", style="dim")
        case "/help":
            notices.print(HELP, style="dim")
        case _ if re.fullmatch(r"/[a-z]+", word):
            notices.print(f"(there is no command {word}; /help lists them)", style="dim")
        case _:
            return None
    return True


def _answer_lines(engine: Engine, sampling: Sampling, history: History) -> None:
    notices = Console(stderr=True, highlight=False, markup=False)
    for line in sys.stdin:
        text = line.rstrip("\r\n")
        if not text.strip():
            continue
        done = _command(text, history, notices)
        if done is False:
            return
        if done is None:
            for piece in _turn(engine, sampling, history, text, notices, speed=False):
                sys.stdout.write(piece)
                sys.stdout.flush()
            sys.stdout.write("\n")
            sys.stdout.flush()


def _talk(engine: Engine, sampling: Sampling, history: History, stream: bool) -> None:
    # Arrow keys and earlier lines at the prompt.
    import readline  # noqa: F401

    console = Console(highlight=False, markup=False)
    console.print(f"steps: {engine.how}", style="dim")
    console.print("Type a message. /help lists the commands, Ctrl-D ends.", style="dim")
    while True:
        try:
            text = input("\nyou> ").strip()
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print("\n(Ctrl-D or /quit ends)", style="dim")
            continue
        done = _command(text, history, console) if text else True
        if done is False:
            return
        if done is None:
            _show_turn(engine, sampling, history, text, console, stream)


def _show_turn(engine: Engine, sampling: Sampling, history: History, text: str, console: Console, stream: bool) -> None:
    try:
        # Closed at once on Ctrl-C, so that the history holds what was said so far.
        with closing(_turn(engine, sampling, history, text, console, speed=stream)) as pieces:
            for piece in pieces if stream else ["".join(pieces)]:
                console.print(piece, end="", soft_wrap=True)
        console.print()
    except KeyboardInterrupt:
        console.print(" (stopped)", style="dim")
    except OarsmithError as error:
        # One message that cannot be answered (too long, refused by the template) must not end the conversation.
        console.print(f"error: {error.what}", style="red")
        if error.fix:
            console.print(f"  fix: {error.fix}", style="dim")
