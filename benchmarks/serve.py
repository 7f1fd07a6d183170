"""`oarsmith serve` beside other servers: the same requests by 16 clients, in turns, and what HTTP costs.

    python benchmarks/serve.py --model DIR --made MODELS --peer llama-server=BINARY llama-cpp-python=PYTHON vllm=PYTHON

Every server is a process of its own with the same threads. Clients ask one request after the other, streamed and
greedy, until all are answered: tokens per second of all together, and how long a request waits for its first text. The
bare engine answers the same ids with as many at once: what it does more is what HTTP costs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stream_client import ask
from turns import machine

import oarsmith
from oarsmith.jobs.bench_systems import Oarsmith, Task

ROOT = Path(__file__).parents[1]
GONE = (OSError, asyncio.IncompleteReadError)
CONTEXT = 2048
START_SECONDS = 300


@dataclass(frozen=True)
class Contender:
    """A server with a model.

    Attributes:
        program: the peer of --peer that has it; "oarsmith" is this one.
        made: the file of --made that it reads; not given: the Hugging Face directory.
        command: its command line, of (program, model, port, clients, threads).
        weights: of ours.
        bare: not a server: the engine alone.
    """

    name: str
    program: str
    command: Callable[[str, str, int, int, int], list[str]] | None = None
    made: str | None = None
    weights: str = "none"

    @property
    def bare(self) -> bool:
        return self.command is None


def ours(weights: str) -> Callable[[str, str, int, int, int], list[str]]:
    def command(program: str, model: str, port: int, clients: int, threads: int) -> list[str]:
        words = [program, "-m", "oarsmith", "serve", model, "--weights", weights, "--dtype", "bf16"]
        words += ["--port", str(port), "--num_threads", str(threads), "--batch_size", str(clients)]
        return [*words, "--log_requests", "false"]

    return command


def llama_server(program: str, model: str, port: int, clients: int, threads: int) -> list[str]:
    words = [program, "-m", model, "--port", str(port), "-np", str(clients), "-c", str(CONTEXT * clients)]
    return [*words, "-t", str(threads), "-tb", str(threads), "--no-webui"]


def llama_python(program: str, model: str, port: int, clients: int, threads: int) -> list[str]:
    words = [program, "-m", "llama_cpp.server", "--model", model, "--port", str(port), "--n_ctx", str(CONTEXT)]
    return [*words, "--n_threads", str(threads), "--n_threads_batch", str(threads), "--interrupt_requests", "false"]


def vllm(program: str, model: str, port: int, clients: int, threads: int) -> list[str]:
    words = [program, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", str(port)]
    return [*words, "--dtype", "bfloat16", "--max-num-seqs", str(clients), "--max-model-len", str(CONTEXT)]


CONTENDERS = (
    Contender("**Oarsmith** int8", "oarsmith", ours("int8")),
    Contender("Oarsmith's engine alone, int8", "oarsmith", weights="int8"),
    Contender("llama-server Q8_0", "llama-server", llama_server, "q8_0.gguf"),
    Contender("llama-cpp-python Q8_0", "llama-cpp-python", llama_python, "q8_0.gguf"),
    Contender("**Oarsmith** bf16", "oarsmith", ours("none")),
    Contender("Oarsmith's engine alone, bf16", "oarsmith"),
    Contender("llama-server BF16", "llama-server", llama_server, "bf16.gguf"),
    Contender("llama-cpp-python BF16", "llama-cpp-python", llama_python, "bf16.gguf"),
    Contender("vLLM bf16", "vllm", vllm),
)


@dataclass(frozen=True)
class Measured:
    """One round of one contender. Times in seconds from the sending of a request to its first text."""

    name: str
    tokens_per_second: float
    first: list[float]
    num_tokens: int


class Requests:
    """Texts of 64 to 256 tokens, no two of which begin alike, and their ids."""

    def __init__(self, model: Path, count: int, new: int) -> None:
        tokenizer = oarsmith.load_tokenizer(model)
        words = (Path(oarsmith.__file__).parent / "demo" / "unrelated.txt").read_text().split()
        draw = random.Random(7)
        self.new, self.texts, self.ids = new, list[str](), list[list[int]]()
        for _ in range(count):
            text = " ".join(draw.choices(words, k=draw.randint(45, 180)))
            self.texts.append(text)
            self.ids.append(tokenizer.encode(text))


async def one(port: int, model: str, text: str, new: int) -> tuple[float, int]:
    """Seconds until the first text, and tokens of the answer."""
    body = {"model": model, "prompt": text, "max_tokens": new, "temperature": 0, "stream": True, "ignore_eos": True}
    begin, first, pieces, counted = time.perf_counter(), None, 0, None
    reply = await ask(port, "/v1/completions", {**body, "stream_options": {"include_usage": True}})
    try:
        if reply.status != 200:
            raise RuntimeError(f"status {reply.status}: {(await reply.body())[:300]!r}")
        async for data in reply.events():
            if data == "[DONE]":
                break
            event = json.loads(data)
            if any(choice.get("text") for choice in event.get("choices", ())):
                first, pieces = first or time.perf_counter() - begin, pieces + 1
            counted = (event.get("usage") or {}).get("completion_tokens", counted)
    finally:
        reply.close()
    # Those that do not count send a piece for each token.
    return first or time.perf_counter() - begin, pieces if counted is None else counted


async def by_clients(port: int, requests: Requests, clients: int, name: str) -> Measured:
    reply = await ask(port, "/v1/models")
    model = json.loads(await reply.body())["data"][0]["id"]
    reply.close()
    await asyncio.gather(*(one(port, model, "Once upon a time", 8) for _ in range(clients)))  # warm
    waiting, found = list(requests.texts)[::-1], list[tuple[float, int]]()

    async def client() -> None:
        while waiting:
            found.append(await one(port, model, waiting.pop(), requests.new))

    begin = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    seconds, tokens = time.perf_counter() - begin, sum(count for _, count in found)
    return Measured(name, tokens / seconds, [first for first, _ in found], tokens)


class Work:
    """How a contender is measured."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.requests = Requests(options.model, options.requests, options.new)

    def measure(self, contender: Contender) -> Measured:
        """Raises:
        RuntimeError: it does not start, or refuses.
        """
        return self._bare(contender) if contender.bare else asyncio.run(self._served(contender))

    def model_of(self, contender: Contender) -> Path:
        model: Path = self.options.model if contender.made is None else self.options.made / contender.made
        return model

    async def _served(self, contender: Contender) -> Measured:
        options = self.options
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        assert contender.command is not None
        program = options.programs[contender.program]
        words = contender.command(program, str(self.model_of(contender)), port, options.clients, options.threads)
        log = self.folder / "server.log"
        with log.open("wb") as output:
            server = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, env=self._environment())
        try:
            await self._ready(server, port, log)
            return await by_clients(port, self.requests, options.clients, contender.name)
        except GONE as error:
            raise RuntimeError(f"{error}: {log.read_text(errors='replace')[-1000:]}") from error
        finally:
            server.terminate()
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()

    async def _ready(self, server: subprocess.Popen[bytes], port: int, log: Path) -> None:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and server.poll() is None:
            try:
                reply = await ask(port, "/v1/models")
            except GONE:
                await asyncio.sleep(0.2)
                continue
            reply.close()
            if reply.status == 200:
                return
            await asyncio.sleep(0.2)
        raise RuntimeError(f"it did not start: {log.read_text(errors='replace')[-1000:]}")

    def _bare(self, contender: Contender) -> Measured:
        """In a process of its own, too."""
        options, task, result = self.options, self.folder / "task.json", self.folder / "result.json"
        config = {"model_name_or_path": str(options.model), "weights": contender.weights, "device": "cpu"}
        config |= {"dtype": "bf16", "num_threads": options.threads, "concurrency": options.clients}
        requests = [(ids, options.new) for ids in self.requests.ids]
        task.write_text(json.dumps({"config": config, "model": str(options.model), "requests": requests}))
        words = [sys.executable, __file__, "--bare", str(task), str(result)]
        done = subprocess.run(words, env=self._environment(), capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(done.stderr[-1000:])
        found = json.loads(result.read_text())
        return Measured(contender.name, found["tokens"] / found["seconds"], found["first"], found["tokens"])

    def _environment(self) -> dict[str, str]:
        threads = str(self.options.threads)
        shared = {"OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "2"}
        return {**os.environ, **shared, "PYTHONPATH": str(ROOT / "src")}


def bare(task_file: str, result_file: str) -> int:
    """The engine alone: as many requests open as there are clients."""
    found = json.loads(Path(task_file).read_text())
    requests = [(list(ids), size) for ids, size in found["requests"]]
    clients = found["config"]["concurrency"]
    system = Oarsmith(Task("oarsmith", found["config"], found["model"], "bf16", requests))
    system.answer([(requests[0][0][:8], 8)] * clients, clients)
    begin = time.perf_counter()
    answers = system.answer(requests, clients)
    seconds = time.perf_counter() - begin
    first = [answer.times[0] - answer.begin for answer in answers]
    tokens = sum(len(answer.times) for answer in answers)
    Path(result_file).write_text(json.dumps({"seconds": seconds, "tokens": tokens, "first": first}))
    return 0


def table(found: list[Measured]) -> str:
    """Medians over the rounds; the waits of all rounds together."""
    lines = ["| | tokens/s | first text, p50 s | p95 s | tokens |", "|---|---|---|---|---|"]
    for name in dict.fromkeys(one.name for one in found):
        rows = [one for one in found if one.name == name]
        rates, first = [one.tokens_per_second for one in rows], sorted(t for one in rows for t in one.first)
        rate = f"{statistics.median(rates):.1f} ({min(rates):.1f}-{max(rates):.1f})"
        p50, p95 = first[len(first) // 2], first[min(len(first) - 1, int(len(first) * 0.95))]
        lines.append(f"| {name} | {rate} | {p50:.2f} | {p95:.2f} | {rows[0].num_tokens} |")
    return "\n".join(lines)


def chosen(options: argparse.Namespace) -> list[Contender]:
    """Those that are asked for, and can be measured; the others are named."""
    found = []
    for one in CONTENDERS:
        if options.systems is not None and not any(word.lower() in one.name.lower() for word in options.systems):
            continue
        if one.program not in options.programs:
            print(f"{one.name}: left out, no --peer {one.program}=PATH", file=sys.stderr)
        elif one.made is not None and (options.made is None or not (options.made / one.made).exists()):
            print(f"{one.name}: left out, there is no {one.made} in --made", file=sys.stderr)
        else:
            found.append(one)
    return found


def main() -> int:
    if sys.argv[1:2] == ["--bare"]:
        return bare(*sys.argv[2:])
    parser = argparse.ArgumentParser(description="oarsmith serve beside other servers.")
    parser.add_argument("--model", required=True, type=Path, help="Hugging Face directory")
    parser.add_argument("--made", type=Path, help="directory with the peers' models")
    parser.add_argument("--peer", nargs="*", default=[], metavar="NAME=PATH", help="llama-server, a Python for others")
    parser.add_argument("--systems", nargs="*", help="only those whose names have one of these words")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--new", type=int, default=128, help="tokens of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, help="also write every measurement to this file")
    options = parser.parse_args()
    if any("=" not in word for word in options.peer):
        parser.error("--peer takes NAME=PATH")
    options.programs = {"oarsmith": sys.executable, **dict(word.split("=", 1) for word in options.peer)}
    contenders, found, failed = chosen(options), list[Measured](), set[str]()
    with tempfile.TemporaryDirectory(prefix="oarsmith-serve-") as folder:
        work = Work(options, Path(folder))
        for round_ in range(options.rounds):
            for contender in contenders if round_ % 2 == 0 else contenders[::-1]:
                if contender.name in failed:
                    continue
                try:
                    found.append(work.measure(contender))
                    print(f"round {round_ + 1} {contender.name}: {found[-1].tokens_per_second:.1f}/s", file=sys.stderr)
                except RuntimeError as error:
                    failed.add(contender.name)
                    print(f"{contender.name} failed: {error}", file=sys.stderr)
    facts: dict[str, Any] = machine(options.threads, ["torch"])
    print(f"{facts['cpu']}; {options.clients} clients, {options.requests} requests of {options.new} new tokens\n")
    print(table(found))
    if options.json is not None:
        options.json.write_text(json.dumps({**facts, "found": [vars(one) for one in found]}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
