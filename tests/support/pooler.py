"""A pooler in transaction mode, as pgbouncer is one.

Each transaction of a client goes to whichever server connection is free, never to the same one twice in a row, and
what a session would keep (LISTEN, prepared statements, settings) is left behind on another one. It refuses startup
parameters that it does not know, as pgbouncer does.
"""

from __future__ import annotations

import asyncio
import struct
from collections import deque
from types import TracebackType
from typing import NamedTuple, TypeAlias
from urllib.parse import parse_qsl, urlencode, urlsplit

import asyncpg

__all__ = ["Pooler"]

Message: TypeAlias = tuple[bytes, bytes]

KNOWN = {"user", "database", "client_encoding", "datestyle", "timezone", "standard_conforming_strings"}
PROTOCOL, NO_ENCRYPTION = 196608, (80877103, 80877104)


class Server(NamedTuple):
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    greeting: bytes


class Pooler:
    """`async with Pooler(dsn) as pooler:` connect to `pooler.dsn`. With `ignores` it takes any startup parameter.

    While its server is unavailable (`login_fails`, `queries_fail`) it reports that as pgbouncer does, with 08P01: at
    login, or, since it answers a login without its server, in place of an answer to the first query.
    """

    def __init__(self, dsn: str, *, ignores: bool = False, size: int = 3) -> None:
        self._upstream, self._ignores, self._size = dsn, ignores, size
        self._free: deque[Server] = deque()
        self._freed = asyncio.Condition()
        self._clients: set[asyncio.Task[None]] = set()
        self.transactions = 0
        self.login_fails: str | None = None
        self.queries_fail: str | None = None

    async def __aenter__(self) -> Pooler:
        probe = await asyncpg.connect(self._upstream)
        self._address, user = probe._addr, await probe.fetchval("SELECT current_user")
        await probe.close()
        parts = urlsplit(self._upstream)
        self._startup = f"user\0{user}\0database\0{parts.path.strip('/')}\0\0".encode()
        for _ in range(self._size):
            self._free.append(await self._connect())
        self._greeting = self._free[0].greeting
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        options = {**dict(parse_qsl(parts.query)), "host": "127.0.0.1", "port": str(port), "sslmode": "disable"}
        self.dsn = f"{parts.scheme}://{user}@{parts.path}?{urlencode(options)}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.close()
        for client in self._clients:
            client.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)
        for server in self._free:
            server.writer.transport.abort()

    async def _connect(self) -> Server:
        if isinstance(self._address, str):
            reader, writer = await asyncio.open_unix_connection(self._address)
        else:
            reader, writer = await asyncio.open_connection(*self._address)
        writer.write(struct.pack("!ii", len(self._startup) + 8, PROTOCOL) + self._startup)
        greeting = b""
        while not greeting.endswith(b"Z\0\0\0\x05I"):
            kind, body = await _message(reader)
            assert kind != b"E", body
            greeting += _packed(kind, body)
        return Server(reader, writer, greeting)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        client = asyncio.current_task()
        assert client is not None
        self._clients.add(client)
        try:
            if await self._welcome(reader, writer):
                asked: asyncio.Future[Message] = asyncio.ensure_future(_message(reader))
                while (await asyncio.shield(asked))[0] != b"X":
                    if self.queries_fail is not None:
                        await _refuse(writer, self.queries_fail)
                        return
                    asked = await self._transaction(asked, reader, writer)
                    self.transactions += 1
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.transport.abort()
            self._clients.discard(client)

    async def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        while True:
            length, code = struct.unpack("!ii", await reader.readexactly(8))
            words = (await reader.readexactly(length - 8)).split(b"\0")
            if code not in NO_ENCRYPTION:
                break
            writer.write(b"N")
        if code != PROTOCOL:  # a client wants to cancel a query
            return False
        unknown = {word.decode() for word in words[:-2:2]} - KNOWN
        if unknown and not self._ignores:
            return await _refuse(writer, f"unsupported startup parameter: {', '.join(unknown)}")
        if self.login_fails is not None:
            return await _refuse(writer, self.login_fails)
        writer.write(self._greeting)
        return True

    async def _transaction(
        self, asked: asyncio.Future[Message], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> asyncio.Future[Message]:
        """Pass one on to a server connection that is free; what the client asks next, for another one."""
        async with self._freed:
            await self._freed.wait_for(lambda: self._free)
            server = self._free.popleft()
        unanswered, is_over = 0, False
        told = asyncio.ensure_future(_message(server.reader))
        try:
            while not is_over:
                await asyncio.wait({asked, told}, return_when=asyncio.FIRST_COMPLETED)
                if asked.done():
                    server.writer.write(_packed(*asked.result()))
                    unanswered += asked.result()[0] in (b"Q", b"S", b"F")
                    asked = asyncio.ensure_future(_message(reader))
                if told.done():
                    writer.write(_packed(*told.result()))
                    unanswered -= told.result()[0] == b"Z"
                    is_over = told.result() == (b"Z", b"I") and not unanswered
                    if not is_over:
                        told = asyncio.ensure_future(_message(server.reader))
        finally:
            told.cancel()
            if not is_over:
                server.writer.transport.abort()
                server = await self._connect()
            async with self._freed:
                self._free.append(server)
                self._freed.notify()
        return asked


async def _refuse(writer: asyncio.StreamWriter, text: str) -> bool:
    """Say why, before the connection is closed; false."""
    writer.write(_packed(b"E", f"SFATAL\0C08P01\0M{text}\0\0".encode()))
    await writer.drain()
    return False


async def _message(reader: asyncio.StreamReader) -> Message:
    kind = await reader.readexactly(1)
    (length,) = struct.unpack("!i", await reader.readexactly(4))
    return kind, await reader.readexactly(length - 4)


def _packed(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("!i", len(body) + 4) + body
