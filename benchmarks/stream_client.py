"""A small HTTP client for benchmarks: a POST with a JSON body, and the events of a streamed answer as they come.

It costs a fraction of what a full client does, for it shares the cores with the server that is measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any


@dataclass
class Reply:
    """An answer that has begun; ``close`` may be called at any time, which the server sees as a client that left."""

    status: int
    headers: dict[str, str]
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body.

        Raises:
            asyncio.IncompleteReadError: the server went away before its end.
        """
        if self.headers.get("transfer-encoding") != "chunked":
            yield await self.reader.readexactly(int(self.headers.get("content-length", "0")))
            return
        while size := int(await self._line(), 16):
            yield await self.reader.readexactly(size)
            await self._line()

    async def body(self) -> bytes:
        return b"".join([piece async for piece in self.pieces()])

    async def events(self) -> AsyncIterator[str]:
        """The data of server-sent events."""
        rest = b""
        async for piece in self.pieces():
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                if line.startswith(b"data:"):
                    yield line[5:].strip().decode()

    async def _line(self) -> bytes:
        line = await self.reader.readline()
        if not line.endswith(b"\n"):
            raise asyncio.IncompleteReadError(line, None)
        return line

    def close(self) -> None:
        self.writer.close()


async def ask(port: int, path: str, body: Any = None, *, host: str = "127.0.0.1") -> Reply:
    """POST a body (GET without one); returns once the status is there.

    Raises:
        OSError, asyncio.IncompleteReadError: there is no answer.
    """
    reader, writer = await asyncio.open_connection(host, port, limit=1 << 20)
    try:
        data = b"" if body is None else json.dumps(body).encode()
        head = f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n"
        if body is not None:
            head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n"
        writer.write(head.encode() + b"\r\n" + data)
        reply = Reply(0, {}, reader, writer)
        # A body that is refused before it is read through; the answer may be there.
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        reply.status = int((await reply._line()).split()[1])
        while line := (await reply._line()).strip():
            name, _, value = line.decode().partition(":")
            reply.headers[name.lower()] = value.strip()
        return reply
    except BaseException:
        writer.close()
        raise
