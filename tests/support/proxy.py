"""A proxy that breaks a connection at the worst moment, and a wait for blocked sessions."""

from __future__ import annotations

import asyncio
import contextlib
from urllib.parse import parse_qsl, urlencode, urlsplit

import asyncpg


def with_options(dsn: str, **options: str) -> str:
    """Return the DSN with other options in its query, and no host before it."""
    parts = urlsplit(dsn)
    query = {"user": parts.username or "postgres", **dict(parse_qsl(parts.query)), **options}
    return f"{parts.scheme}://{parts.path}?{urlencode(query)}"


class Line:
    """A line to the server that breaks at the worst moment: when the server has committed and answered, but the answer
    has not arrived. A TCP proxy, so that the server and asyncpg are the real ones.

        async with Line(dsn) as line: connect to line.dsn; line.swallow() cuts it at the next answer.
    """

    def __init__(self, dsn: str) -> None:
        self._upstream = dsn
        self._swallow = False
        self._swallowing: set[asyncio.StreamWriter] = set()  # lines that are cut at their next answer
        self._asked: dict[asyncio.StreamWriter, bytes] = {}  # by line: what its client has sent last
        self._trap: tuple[bytes, str] | None = None
        self._go = asyncio.Event()
        self._lines: set[asyncio.Task[None]] = set()
        self.cut = 0

    async def __aenter__(self) -> Line:
        probe = await asyncpg.connect(self._upstream)
        self._address = probe._addr
        await probe.close()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.dsn = with_options(self._upstream, host="127.0.0.1", port=str(port), sslmode="disable")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._lines:
            task.cancel()
        await asyncio.gather(*self._lines, return_exceptions=True)
        await self._server.wait_closed()

    def swallow(self, question: bytes = b"") -> None:
        """Cut the line that gets the next answer; or, with `question`, the one that waits for the answer to that."""
        if question:
            self._swallowing = {line for line, asked in self._asked.items() if question in asked}
        else:
            self._swallow = True

    def trap(self, text: bytes, how: str) -> None:
        """Cut the line of the next client that sends this text: `before` it reaches the server, `after` the server has
        answered it, or `late`: the server gets it when `release` is called, and has the line until then."""
        self._trap = text, how

    def release(self) -> None:
        self._go.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._lines.add(task)
        if isinstance(self._address, str):
            answers, questions = await asyncio.open_unix_connection(self._address)
        else:
            answers, questions = await asyncio.open_connection(*self._address)
        upward = asyncio.create_task(self._pass(reader, questions, writer))
        try:
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):  # an end has closed, or the test has
                await self._answer(answers, writer)
        finally:
            upward.cancel()
            for end in (writer, questions):
                end.transport.abort()

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, client: asyncio.StreamWriter
    ) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                self._asked[client] = data
                if self._trap is not None and self._trap[0] in data:
                    (_, how), self._trap = self._trap, None
                    if how == "after":
                        self._swallowing.add(client)
                    else:
                        self.cut += 1
                        client.transport.abort()
                    if how == "before":
                        break
                    if how == "late":
                        await self._go.wait()
                        writer.write(data)
                        return
                writer.write(data)
        writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            if self._swallow or writer in self._swallowing:
                self._swallow = False
                self._swallowing.discard(writer)
                self.cut += 1
                return
            writer.write(data)
