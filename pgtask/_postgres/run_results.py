"""Waits for the ends of runs: any number of waiters on one connection.

Invariants: a notification is a hint; the record counts. It is read for all waiters at once when they begin, when a
notification names their run, when the connection was lost, and at intervals. The interval depends on whether
notifications come: a pooler may take a LISTEN and never pass a notification on.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID

from pgtask._backoff import Backoff
from pgtask._postgres.connection import map_errors
from pgtask._postgres.store import Link, statement
from pgtask.errors import DatabaseUnavailable

__all__ = ["CHANNEL", "ResultWaiter"]

CHANNEL = "pg_task_ended"
POLL = 5.0  # seconds between two reads while notifications come
INITIAL_POLL, MAX_POLL = 0.05, 1.0  # while they do not: twice as long each time, until something happens
CHUNK = 1000


class ResultWaiter:
    """The waiters of one client. `fetch` runs a query on one of its connections. Close it at the end."""

    def __init__(self, dsn: str, fetch: Callable[..., Awaitable[list[Any]]], *, listens: bool) -> None:
        self._fetch = fetch
        self._link = Link(dsn, "pgtask results", on_open=self._listen) if listens else None
        self._polls = not listens
        self._pauses = Backoff(INITIAL_POLL, MAX_POLL)
        self._waiting: dict[UUID, list[asyncio.Future[Any]]] = defaultdict(list)
        self._to_read: set[UUID] = set()
        self._changed = asyncio.Event()
        self._reader: asyncio.Task[None] | None = None

    async def wait(self, run: UUID) -> tuple[str, str | None, str | None]:
        """Return the state, output and error of a run when it has ended. Raises `DatabaseRefused`."""
        ended: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting[run].append(ended)
        self._to_read.add(run)
        self._pauses.reset()
        self._changed.set()
        if self._reader is None or self._reader.done():
            self._reader = asyncio.create_task(self._read())
        try:
            found: tuple[str, str | None, str | None] = await ended
            return found
        finally:
            if ended in self._waiting.get(run, ()):
                self._waiting[run].remove(ended)
                if not self._waiting[run]:
                    del self._waiting[run]

    async def close(self) -> None:
        """Close the connection; a caller that still waits gets `CancelledError`."""
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
        for waiters in self._waiting.values():
            for ended in waiters:
                ended.cancel()
        if self._link is not None:
            await self._link.close()

    async def _listen(self, connection: Any) -> None:
        connection.add_termination_listener(lambda _: self._changed.set())
        await connection.add_listener(CHANNEL, self._notified)
        self._to_read.update(self._waiting)

    def _notified(self, _connection: Any, _pid: int, _channel: str, payload: str) -> None:
        for word in payload.split(","):
            run = UUID(word)
            if run in self._waiting:
                self._polls = False
                self._to_read.add(run)
                self._changed.set()

    async def _read(self) -> None:
        """Read for as long as a caller waits."""
        try:
            while self._waiting:
                self._changed.clear()
                await self._read_now()
                if self._changed.is_set():
                    continue
                if self._waiting and not await self._is_notified():
                    self._to_read.update(self._waiting)
                    if await self._read_now():  # without a notification
                        self._polls = True
                        self._pauses.reset()
        except Exception as error:
            for waiters in self._waiting.values():
                for ended in waiters:
                    if not ended.done():
                        ended.set_exception(error)

    async def _is_notified(self) -> bool:
        """Wait for something to read, until the next poll at most; false then."""
        seconds = self._pauses.next() if self._polls else POLL
        try:
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        except TimeoutError:
            return False
        return True

    async def _read_now(self) -> int:
        """Listen, unless it does already, and then read: no end is missed in between. Returns the count of ends."""
        found = 0
        try:
            if self._link is not None:
                await self._link.open()
            while self._to_read:
                runs = [self._to_read.pop() for _ in range(min(CHUNK, len(self._to_read)))]
                with map_errors():
                    rows = await self._fetch(statement("runs/result"), runs)
                found += len(rows)
                for run, *outcome in rows:
                    for ended in self._waiting.pop(run, ()):
                        if not ended.done():
                            ended.set_result(tuple(outcome))
        except DatabaseUnavailable:
            self._to_read.update(self._waiting)
            await asyncio.sleep(0.1)  # it is asked again at the next poll
        return found
