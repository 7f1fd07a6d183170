"""``oarsmith request``: ask a server, with the standard library alone."""

from __future__ import annotations

import http.client
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

from oarsmith.config.request import RequestConfig
from oarsmith.config.resolved import Resolved
from oarsmith.errors import OarsmithError

_SAME = {"served_model_name": "model", "max_new_tokens": "max_tokens"}
_SENT = ("served_model_name", "max_new_tokens", "temperature", "top_p", "seed")


def run(resolved: Resolved[RequestConfig]) -> int:
    """The command: the answer on stdout, its tokens and speed on stderr."""
    config = resolved.config
    began = time.perf_counter()
    first: float | None = None
    finish: str | None = None
    usage: dict[str, Any] = {}
    for piece in _pieces(config):
        usage = piece.get("usage") or usage
        for choice in piece.get("choices", []):
            said = choice.get("delta", choice.get("message", {}))
            finish = choice.get("finish_reason") or finish
            if text := said.get("content"):
                first = first or time.perf_counter() - began
                print(text, end="", flush=True)
            for call in said.get("tool_calls") or []:
                print(json.dumps(call, ensure_ascii=False), flush=True)
    print(flush=True)
    if finish is None:
        raise OarsmithError("the answer ends in the middle", where=config.url, fix="ask again; see the server's log")
    _report(usage, time.perf_counter() - began, first if config.stream else None, finish)
    return 0


def _report(usage: dict[str, Any], seconds: float, first: float | None, finish: str) -> None:
    tokens = usage.get("completion_tokens", 0)
    after = "" if first is None else f", the first after {first:.2f} s"
    print(
        f"{usage.get('prompt_tokens', 0)} prompt tokens, {tokens} new in {seconds:.1f} s "
        f"({tokens / max(seconds, 1e-9):.1f} tokens/s){after}; {finish}",
        file=sys.stderr,
    )


def _pieces(config: RequestConfig) -> Iterator[dict[str, Any]]:
    """Objects as they come: chunks of a stream, or the one answer."""
    try:
        with urllib.request.urlopen(_request(config), timeout=config.timeout) as response:
            if not config.stream:
                yield _object(response.read(), config)
                return
            for line in response:
                data = line.strip().removeprefix(b"data:").strip()
                if data == b"[DONE]":
                    return
                if data and not data.startswith(b":"):
                    yield _object(data, config)
    except urllib.error.HTTPError as error:
        raise _refusal(error, config) from error
    except urllib.error.URLError as error:
        raise OarsmithError(
            f"nothing answers at {config.url}: {error.reason}", where="url", fix="start one: oarsmith serve MODEL"
        ) from error
    except TimeoutError as error:
        what = f"the server said nothing for {config.timeout:g} seconds"
        raise OarsmithError(what, where=config.url, fix="raise --timeout") from error
    except (OSError, http.client.HTTPException) as error:
        what = "the connection broke off"
        raise OarsmithError(what, where=config.url, fix="ask again; see the server's log") from error


def _request(config: RequestConfig) -> urllib.request.Request:
    prompt = sys.stdin.read() if config.prompt == "-" else config.prompt
    system = [] if config.system is None else [{"role": "system", "content": config.system}]
    body: dict[str, Any] = {"messages": [*system, {"role": "user", "content": prompt}], "stream": config.stream}
    if config.stream:
        body["stream_options"] = {"include_usage": True}
    values = dict(config)
    body |= {_SAME.get(name, name): values[name] for name in _SENT if values[name] is not None}
    headers = {"Content-Type": "application/json", "User-Agent": "oarsmith-request"}
    if key := config.api_key or os.environ.get("OARSMITH_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    base = config.url.rstrip("/").removesuffix("/v1")
    if not base.startswith(("http://", "https://")):
        raise OarsmithError(f"{config.url!r} is no address", where="url", fix="write http://HOST:PORT")
    return urllib.request.Request(f"{base}/v1/chat/completions", json.dumps(body).encode(), headers)


def _object(data: bytes, config: RequestConfig) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError as error:
        raise OarsmithError("the server does not speak OpenAI's protocol", where=config.url, fix="see --url") from error
    if not isinstance(found, dict):
        raise OarsmithError("the server does not speak OpenAI's protocol", where=config.url, fix="see --url")
    if "error" in found:
        raise OarsmithError(_message(found), where=config.url)
    return found


def _refusal(error: urllib.error.HTTPError, config: RequestConfig) -> OarsmithError:
    fixes = {401: "set OARSMITH_API_KEY", 404: "see --served_model_name and --url", 503: "try again later"}
    wait = error.headers.get("Retry-After")
    fix = f"try again in {wait} seconds" if wait else fixes.get(error.code)
    try:
        message = _message(json.loads(error.read()))
    except (ValueError, OSError):
        message = str(error.reason)
    return OarsmithError(f"HTTP {error.code}: {message}", where=config.url, fix=fix)


def _message(body: Any) -> str:
    told = body.get("error") if isinstance(body, dict) else None
    return str(told.get("message") if isinstance(told, dict) else told or "no reason given")
