"""wake: be told when something may have become due.

Invariants: a notification is a hint and carries no truth; the connection listens first and then hints once, so nothing
that was committed before it listened is missed; nothing but LISTEN and a ping ever runs on it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from pgtask._events import log_event
from pgtask._postgres.store import Link

__all__ = ["CHANNEL", "STOP", "Wake"]

log = logging.getLogger("pgtask.wake")

CHANNEL = "pg_task_changed"
STOP = "stop_worker"
PING_INTERVAL = 30.0
PING_DEADLINE = 10.0


class Wake:
    """Listens on a connection of its own. `hint` is called for each notification and after each (re)connection; `stop`
    when a worker is asked to stop by `NOTIFY pg_task_changed, 'stop_worker'`."""

    def __init__(self, dsn: str, *, name: str, hint: Callable[[], None], stop: Callable[[], None] | None) -> None:
        self._link = Link(dsn, name, on_open=self._listen)
        self._hint = hint
        self._stop = stop
        self._lost = asyncio.Event()

    async def open(self) -> None:
        """Listen; waits out a database that is away. Raises `DatabaseRefused`."""
        await self._link.connected()

    async def run(self) -> None:
        """Keep listening until cancelled. Raises `DatabaseRefused`."""
        try:
            while True:
                await self._link.connected()
                try:
                    async with asyncio.timeout(PING_INTERVAL):
                        await self._lost.wait()
                except TimeoutError:
                    await self._ping()
        finally:
            await self._link.close()

    async def _listen(self, connection: Any) -> None:
        self._lost.clear()
        connection.add_termination_listener(lambda _: self._lost.set())
        await connection.add_listener(CHANNEL, self._notified)
        self._hint()

    def _notified(self, _connection: Any, _pid: int, _channel: str, payload: str) -> None:
        if payload == STOP:
            if self._stop is not None:
                log_event(log, logging.INFO, "stop.notified")
                self._stop()
            return
        self._hint()

    async def _ping(self) -> None:
        """A middlebox may keep a dead line open: only an answer from the server proves that it is there."""
        connection = self._link.connection
        try:
            async with asyncio.timeout(PING_DEADLINE):
                await connection.execute("SELECT 1")
        except Exception as error:
            log_event(log, logging.WARNING, "listen.lost", error=str(error) or type(error).__name__)
            self._link.drop()
