"""`oarsmith serve` under load: is anything lost, mixed up or leaked?

    python benchmarks/serve_load.py [--minutes 10] [--clients 64]

Streaming clients ask a tiny model whose answers are known (cycle_model.py) and check every token. Some leave in the
middle of an answer, some send a prompt or a body that is too large. Then: all pages of the cache are free again, memory
has not grown, and after SIGTERM under load everything that had begun is finished. Exit status 1 if not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from cycle_model import CONTEXT, Cycle, write_cycle_model
from stream_client import Reply, ask

ROOT = Path(__file__).parents[1]
TOKENIZER = ROOT / "tests" / "fixtures" / "tokenizers" / "qwen25_bpe_json"
FREE_PAGES, ALL_PAGES = "oarsmith_cache_free_pages", "oarsmith_cache_pages"
# Of a run long enough to say: memory that grows at this rate is a leak.
MOST_GROWTH, LEAST_MINUTES = 1.0, 3.0
LARGE_BODY = 9 << 20
GONE = (OSError, asyncio.IncompleteReadError, ValueError)


class WrongAnswerError(Exception):
    """Not what the model says to that prompt."""


class Load:
    """Clients, and what became of their requests.

    Attributes:
        counts: requests by what became of them.
        wrong: what should not have been, in words.
    """

    def __init__(self, cycle: Cycle, port: int, num_clients: int) -> None:
        self.cycle, self.port, self.num_clients = cycle, port, num_clients
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.ending = False

    async def run(self, until: float) -> None:
        """All clients, one request after the other, until a time (of the monotonic clock)."""
        await asyncio.gather(*(self._client(number, until) for number in range(self.num_clients)))

    async def _client(self, number: int, until: float) -> None:
        draw = random.Random(f"{number} {until}")
        while time.monotonic() < until and not self.ending:
            try:
                self.counts[await self._request(draw)] += 1
            except WrongAnswerError as error:
                self.wrong.append(str(error))
            except GONE as error:
                if self.ending:
                    self.counts["came too late"] += 1
                else:
                    self.wrong.append(f"no answer: {type(error).__name__} {error}"[:200])

    async def _request(self, draw: random.Random) -> str:
        kind = draw.choices(("answered", "left", "prompt too long", "body too large"), (80, 14, 5, 1))[0]
        if kind == "body too large":
            try:
                return await self._refused(kind, {"prompt": "a" * LARGE_BODY})
            except GONE:
                # It was refused while it was on its way: what the server said may not have come through.
                return "body too large, cut off"
        if kind == "prompt too long":
            return await self._refused(kind, {"prompt": draw.choices(self.cycle.ids, k=CONTEXT + 100)})
        place, count = draw.randrange(len(self.cycle.ids)), draw.randint(1, 200)
        prompt = self.cycle.prompt(place, draw.randint(1, 300), draw)
        body = {"prompt": prompt, "max_tokens": count, "temperature": 0, "stream": True, "ignore_eos": True}
        reply = await ask(self.port, "/v1/completions", body)
        try:
            if reply.status in (429, 503):
                await reply.body()
                await asyncio.sleep(draw.random())
                return "refused: busy" if reply.status == 429 else "refused: ending"
            leave = draw.randint(0, count) if kind == "left" else None
            return await self._read(reply, self.cycle.after(place, count), leave)
        except GONE as error:
            # It had begun: whatever happens to the server, this must not.
            raise WrongAnswerError(f"status {reply.status}, then lost: {type(error).__name__}") from error
        finally:
            reply.close()

    async def _read(self, reply: Reply, expected: str, leave: int | None) -> str:
        if reply.status != 200:
            raise WrongAnswerError(f"status {reply.status}: {(await reply.body())[:200]!r}")
        text, reason, num_events = "", None, 0
        async for data in reply.events():
            if leave is not None and num_events >= leave:
                return "left"
            num_events += 1
            if data == "[DONE]":
                if text != expected or reason != "length":
                    raise WrongAnswerError(f"{text!r} ({reason}) is not {expected!r}")
                return "answered"
            found = json.loads(data)
            if "error" in found:
                raise WrongAnswerError(f"an error in the stream: {data[:200]}")
            for choice in found["choices"]:
                text += choice["text"]
                reason = choice["finish_reason"] or reason
            if not expected.startswith(text):
                raise WrongAnswerError(f"{text!r} is not how {expected!r} begins")
        raise WrongAnswerError("the stream ended without [DONE]")

    async def _refused(self, kind: str, body: dict[str, object]) -> str:
        reply = await ask(self.port, "/v1/completions", body)
        try:
            found = await reply.body()
            if not 400 <= reply.status < 500:
                raise WrongAnswerError(f"{kind}: status {reply.status} {found[:200]!r}")
            if reply.status != 429 and not json.loads(found)["error"]["message"]:
                raise WrongAnswerError(f"{kind}: no message")
            return kind
        finally:
            reply.close()


class Server:
    """The command in a process of its own."""

    def __init__(self, model: Path, log: Path, words: list[str]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "oarsmith", "serve", str(model), "--port", str(self.port), *words]
        self.log = log
        with log.open("wb") as output:
            env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=env)

    async def ready(self, seconds: float = 120.0) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            try:
                reply = await ask(self.port, "/ready")
            except GONE:
                await asyncio.sleep(0.1)
                continue
            reply.close()
            if reply.status == 200:
                return
        raise SystemExit(f"the server did not start:\n{self.log.read_text(errors='replace')[-3000:]}")

    def rss(self) -> float:
        """MiB."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))

    async def metrics(self) -> dict[str, float]:
        """Values without labels."""
        reply = await ask(self.port, "/metrics")
        lines = (await reply.body()).decode().splitlines()
        reply.close()
        return {line.split()[0]: float(line.split()[1]) for line in lines if line[:1].isalpha() and "{" not in line}


async def watch_memory(server: Server, found: list[tuple[float, float]]) -> None:
    while True:
        found.append((time.monotonic(), server.rss()))
        await asyncio.sleep(0.5)


def growth(samples: list[tuple[float, float]]) -> float:
    """MiB a minute, over the second half: the least squares' line."""
    half = samples[len(samples) // 2 :]
    middle_t, middle_m = (sum(column) / len(half) for column in zip(*half, strict=True))
    spread = sum((t - middle_t) ** 2 for t, _ in half)
    return 60 * sum((t - middle_t) * (m - middle_m) for t, m in half) / spread if spread else 0.0


async def measure(options: argparse.Namespace, folder: Path) -> int:
    cycle = write_cycle_model(folder / "model", TOKENIZER)
    words = ["--num_threads", str(options.threads), "--max_waiting", str(4 * options.clients), "--grace_seconds", "60"]
    words += ["--log_requests", "false"]
    server = Server(folder / "model", folder / "server.log", words)
    try:
        await server.ready()
        load = Load(cycle, server.port, options.clients)
        memory: list[tuple[float, float]] = []
        watching = asyncio.create_task(watch_memory(server, memory))
        start = time.monotonic()
        await load.run(start + 60 * options.minutes)
        watching.cancel()
        await asyncio.sleep(1.0)  # who left last is noticed
        metrics, slope = await server.metrics(), growth(memory)
        if metrics[FREE_PAGES] != metrics[ALL_PAGES]:
            load.wrong.append(f"{metrics[ALL_PAGES] - metrics[FREE_PAGES]:.0f} pages are not free")
        if slope > MOST_GROWTH and options.minutes >= LEAST_MINUTES:
            load.wrong.append(f"memory grows by {slope:.2f} MiB a minute")
        before = load.counts.copy()
        await end_under_load(server, load)
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()
    rows = {name: str(count) for name, count in sorted(before.items())}
    rows |= {f"at the end: {name}": str(count) for name, count in sorted((load.counts - before).items())}
    rows["pages free / all"] = f"{metrics[FREE_PAGES]:.0f} / {metrics[ALL_PAGES]:.0f}"
    rows["memory, MiB: after a tenth, at the end, a minute"] = (
        f"{memory[len(memory) // 10][1]:.1f}, {memory[-1][1]:.1f}, {slope:+.2f}"
    )
    rows["lost, mixed up or leaked"] = str(len(load.wrong))
    print(f"| {options.clients} clients, {options.minutes:g} minutes | |\n|---|---|")
    print("\n".join(f"| {name} | {value} |" for name, value in rows.items()))
    for text in load.wrong[:20]:
        print(text, file=sys.stderr)
    return 1 if load.wrong or not before["answered"] else 0


async def end_under_load(server: Server, load: Load) -> None:
    """SIGTERM while every client has a request open."""
    clients = asyncio.create_task(load.run(time.monotonic() + 30))
    await asyncio.sleep(2.0)
    load.ending = True
    server.process.send_signal(signal.SIGTERM)
    await clients
    try:
        status = await asyncio.to_thread(server.process.wait, 60)
    except subprocess.TimeoutExpired:
        load.wrong.append("the server did not end within a minute of SIGTERM")
        return
    if status != 0:
        load.wrong.append(f"the server ended with status {status}")


def main() -> int:
    parser = argparse.ArgumentParser(description="oarsmith serve under load.")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1, help="of the engine; the model is tiny")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="oarsmith-load-") as folder:
        return asyncio.run(measure(options, Path(folder)))


if __name__ == "__main__":
    sys.exit(main())
