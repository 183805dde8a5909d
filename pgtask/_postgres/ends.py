"""Waiting for the ends of runs: any number of waiters on one connection.

Invariants: a notification is a hint; what counts is the record, which is read for all waiters at once when they begin,
when a notification names their run, when the connection was lost, and now and then. How often that is depends on
whether notifications come: a pooler may take a LISTEN and never pass anything on.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID

from pgtask._postgres.connection import map_errors
from pgtask._postgres.store import Link, statement
from pgtask.errors import DatabaseUnavailable

__all__ = ["CHANNEL", "Ends"]

CHANNEL = "pg_task_ended"
POLL = 5.0  # seconds between two reads while notifications come
FIRST_POLL, LONGEST_POLL = 0.05, 1.0  # while they do not: twice as long each time, until something happens
CHUNK = 1000


class Ends:
    """The waiters of one client. `fetch` runs a query on one of its connections. To be closed."""

    def __init__(self, dsn: str, fetch: Callable[..., Awaitable[list[Any]]], *, listens: bool) -> None:
        self._fetch = fetch
        self._link = Link(dsn, "pgtask results", on_open=self._listen) if listens else None
        self._is_deaf = not listens
        self._poll = FIRST_POLL
        self._waiting: dict[UUID, list[asyncio.Future[Any]]] = defaultdict(list)
        self._to_read: set[UUID] = set()
        self._changed = asyncio.Event()
        self._reader: asyncio.Task[None] | None = None

    async def wait(self, run: UUID) -> tuple[str, str | None, str | None]:
        """State, output and error of a run when it has ended. Raises `DatabaseRefused`."""
        ended: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting[run].append(ended)
        self._to_read.add(run)
        self._poll = FIRST_POLL
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
        """End the connection; who still waits gets `CancelledError`."""
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
                self._is_deaf = False
                self._to_read.add(run)
                self._changed.set()

    async def _read(self) -> None:
        """For as long as somebody waits."""
        try:
            while self._waiting:
                self._changed.clear()
                await self._read_now()
                if self._changed.is_set():
                    continue
                if self._waiting and not await self._is_told():
                    self._to_read.update(self._waiting)
                    if await self._read_now():  # which nobody has told us
                        self._is_deaf, self._poll = True, FIRST_POLL
        except Exception as error:
            for waiters in self._waiting.values():
                for ended in waiters:
                    if not ended.done():
                        ended.set_exception(error)

    async def _is_told(self) -> bool:
        """Wait for something to read, no longer than until the next poll."""
        seconds = self._poll if self._is_deaf else POLL
        self._poll = min(2 * self._poll, LONGEST_POLL)
        try:
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        except TimeoutError:
            return False
        return True

    async def _read_now(self) -> int:
        """Listen, if that is not so yet, and then read, so that nothing is missed in between. How many have ended."""
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
            await asyncio.sleep(0.1)  # the database is away: it is asked again at the next poll
        return found
