"""A line to the server that counts the round trips of a client."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from typing import Any

import asyncpg
from proxy import with_options


class RoundTrips:
    """Counts how often the client has sent something after an answer of the server.

    with RoundTrips(dsn) as line: connect to line.dsn; then look at line.count
    """

    def __init__(self, dsn: str) -> None:
        self._upstream = dsn
        self._address = asyncio.run(_address(dsn))
        self._server = socket.create_server(("127.0.0.1", 0))
        port = self._server.getsockname()[1]
        self.dsn = with_options(dsn, host="127.0.0.1", port=str(port), sslmode="disable")
        self.count = 0
        self._was_answered = True
        self._ends: list[socket.socket] = [self._server]
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> RoundTrips:
        self._start(self._serve)
        return self

    def __exit__(self, *_: object) -> None:
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        for thread in self._threads:
            thread.join(10)

    def _start(self, target: Any, *args: Any) -> None:
        self._threads.append(threading.Thread(target=target, args=args, daemon=True))
        self._threads[-1].start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX if isinstance(self._address, str) else socket.AF_INET)
            server.connect(self._address)
            self._ends += [client, server]
            self._start(self._pass, client, server, True)
            self._start(self._pass, server, client, False)

    def _pass(self, source: socket.socket, sink: socket.socket, is_question: bool) -> None:
        try:
            while data := source.recv(65536):
                self.count += is_question and self._was_answered
                self._was_answered = not is_question
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass


async def _address(dsn: str) -> Any:
    connection = await asyncpg.connect(dsn)
    try:
        return connection._addr
    finally:
        await connection.close()
