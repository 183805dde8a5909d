"""The program of the exporter: a child of the supervisor that serves the metrics and the probes of the fleet.

Invariants: it reads what the workers write, and asks them nothing; it ends when the supervisor does.
"""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

import msgspec

from pgtask._observe import pages
from pgtask._observe.database import PATIENCE, DatabaseProbe
from pgtask._observe.fleets import FLEET_PATH, UsageReader
from pgtask._observe.health import find_dead, find_unready
from pgtask._observe.metrics import encode
from pgtask._observe.server import Answer, MetricsServer
from pgtask.config import Config

__all__ = ["run_exporter"]

T = TypeVar("T")

MAX_WAIT = 2 * PATIENCE + 1  # seconds for an answer of the database, behind another request


def run_exporter(config: Config, server: socket.socket, pages_fd: int, parent_fd: int) -> int:
    """Serve at a socket what the file of the pages holds, `pages_fd`, until `parent_fd` reads EOF."""
    asyncio.run(_serve(config, server, pages_fd, parent_fd))
    return 0


async def _serve(config: Config, server: socket.socket, file: int, parent_fd: int) -> None:
    assert config.dsn is not None
    loop = asyncio.get_running_loop()
    exporter = _Exporter(file, DatabaseProbe(config.dsn, pooled=not config.listen), loop)
    routes = {
        "/metrics": exporter.metrics,
        "/livez": exporter.livez,
        "/readyz": exporter.readyz,
        FLEET_PATH: exporter.fleet,
    }
    serving = MetricsServer(server, routes)
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    # At once: a thread of the server may be waiting for this loop.
    loop.add_reader(parent_fd, os._exit, 0)
    await asyncio.Event().wait()


class _Exporter:
    """The answers. The threads of the server call the methods."""

    def __init__(self, file: int, database: DatabaseProbe, loop: asyncio.AbstractEventLoop) -> None:
        self._file = file
        self._database = database
        self._loop = loop
        self._usage = UsageReader()

    def metrics(self, accept: str) -> Answer:
        depth = self._ask(self._database.depth())
        return Answer(200, *encode(pages.read(self._file), depth, accept))

    def livez(self, _: str) -> Answer:
        return Answer.of_checks(find_dead(pages.read(self._file), time.monotonic()))

    def readyz(self, _: str) -> Answer:
        database = self._ask(self._database.ping())
        return Answer.of_checks(find_unready(pages.read(self._file), time.monotonic(), database))

    def fleet(self, _: str) -> Answer:
        """Answer `pgtask top --from`: the whole snapshot."""
        (seen,) = self._usage.see([pages.read(self._file)])
        return Answer(200, msgspec.json.encode(seen))

    def _ask(self, question: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(question, self._loop).result(MAX_WAIT)
