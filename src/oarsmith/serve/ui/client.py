"""What the page asks the server: its models, and answers as they come."""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx

# An answer may take long to begin where many wait.
_TIMEOUT = httpx.Timeout(10.0, read=600.0)
_MAX_LINE = 300


class PageError(Exception):
    """One short line for the page, whatever the server said."""

    def __init__(self, text: str) -> None:
        line = " ".join(text.split())
        super().__init__(line if len(line) <= _MAX_LINE else line[: _MAX_LINE - 1] + "…")


@dataclass
class Answering:
    """An answer on its way.

    Attributes:
        text: so far.
        num_prompt, num_new: tokens, known at the end.
        first: seconds until its first text.
        seconds: until now.
    """

    text: str = ""
    num_prompt: int = 0
    num_new: int = 0
    first: float | None = None
    seconds: float = 0.0
    finish: str | None = None
    started: float = field(default_factory=time.monotonic)

    def tick(self) -> None:
        """Note the time."""
        self.seconds = time.monotonic() - self.started

    @property
    def line(self) -> str:
        """Tokens and speed, in words."""
        if not self.num_new:
            return ""
        rate = (self.num_new - 1) / max(self.seconds - (self.first or 0.0), 1e-3)
        speed = f", {rate:.1f} tokens/s" if self.num_new > 1 else ""
        begun = "" if self.first is None else f", first after {self.first:.2f} s"
        cut = "; cut at the limit" if self.finish == "length" else ""
        return f"{self.num_prompt} tokens read, {self.num_new} written{speed}{begun}{cut}"


class Client:
    """The server, for one page.

    Args:
        url: of the server, without /v1.
        api_key: where it needs one; it stays in this process.
    """

    def __init__(self, url: str, api_key: str | None) -> None:
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        # The server is this machine's own: no proxy of the environment lies between.
        self._http = httpx.Client(base_url=url, headers=headers, timeout=_TIMEOUT, trust_env=False)

    def models(self) -> list[str]:
        """Names that a request may give.

        Raises:
            PageError: the server does not answer.
        """
        try:
            response = self._http.get("/v1/models")
            _check(response)
            return [str(model["id"]) for model in response.json()["data"]]
        except httpx.HTTPError as error:
            raise _gone() from error
        except (ValueError, KeyError, TypeError) as error:
            raise _unreadable() from error

    def answer(self, body: dict[str, Any]) -> Generator[Answering, None, None]:
        """The answer to a chat request, after each piece. To close the iterator is to give the answer up.

        Raises:
            PageError: there is none.
        """
        answering = Answering()
        whole = {**body, "stream": True, "stream_options": {"include_usage": True}}
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=whole) as response:
                if response.status_code != 200:
                    response.read()
                    _check(response)
                for line in response.iter_lines():
                    if line.startswith("data: ") and line != "data: [DONE]" and _take(answering, json.loads(line[6:])):
                        yield answering
        except httpx.HTTPError as error:
            raise _gone() from error
        except (ValueError, KeyError, TypeError) as error:
            raise _unreadable() from error
        if answering.finish is None:
            raise PageError("the answer broke off")
        answering.tick()
        yield answering

    def close(self) -> None:
        """No more requests."""
        self._http.close()


def _take(answering: Answering, chunk: dict[str, Any]) -> bool:
    """Put a chunk in; whether there is something to show."""
    if "error" in chunk:
        raise PageError(str(chunk["error"]["message"]))
    answering.tick()
    if chunk.get("usage"):
        answering.num_prompt = chunk["usage"]["prompt_tokens"]
        answering.num_new = chunk["usage"]["completion_tokens"]
    for choice in chunk["choices"]:
        answering.finish = choice["finish_reason"] or answering.finish
        if text := choice["delta"].get("content"):
            if answering.first is None:
                answering.first = answering.seconds
            answering.text += text
            return True
    return False


def _check(response: httpx.Response) -> None:
    if response.status_code == 200:
        return
    message = f"the server answers {response.status_code}"
    with suppress(ValueError, KeyError, TypeError):
        message = str(response.json()["error"]["message"])
    raise PageError(message)


def _gone() -> PageError:
    return PageError("the server does not answer; it may be starting or gone: try again in a moment")


def _unreadable() -> PageError:
    return PageError("what the server answers cannot be read; is it a server of Oarsmith or OpenAI's API?")


def request_of(
    messages: Sequence[dict[str, str]], system: str, model: str | None, settings: dict[str, Any]
) -> dict[str, Any]:
    """A chat request. Settings that are None or "" are left to the server.

    Raises:
        PageError: a seed that is no whole number.
    """
    seed = str(settings.get("seed") or "").strip()
    if seed and not seed.lstrip("-").isdecimal():
        raise PageError("the seed must be a whole number")
    said = [{"role": message["role"], "content": message["content"]} for message in messages]
    first = [{"role": "system", "content": system}] if system.strip() else []
    body: dict[str, Any] = {"messages": [*first, *said]}
    if model:
        body["model"] = model
    settings = {**settings, "seed": int(seed) if seed else None}
    return body | {name: value for name, value in settings.items() if value is not None}
