"""The stream of tasks that are parked, on a connection of its own.

Invariants: a notification only names a task, its row is the truth; the connection listens before it reads the tasks
that were parked while it did not; a task is yielded once each time that it is parked; the buffer for a slow reader is
bounded.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import msgspec

from pgtask._placement import shown_key
from pgtask._postgres.store import Link
from pgtask._postgres.tasks import aware, plain_values
from pgtask._postgres.times import allow_far_times
from pgtask.errors import ConfigError

__all__ = ["ParkedTask", "follow_failures"]

CHANNEL = "pg_task_error"
PING_INTERVAL = 30.0  # seconds of silence after which the connection is tested
OVERLAP = timedelta(minutes=1)  # the longest transaction that may park a task while the connection is down
CHUNK_SIZE = 100
MAX_NAMED = 10_000  # notifications that wait for a slow reader; beyond that, the table is read instead


class ParkedTask(msgspec.Struct, frozen=True, kw_only=True):
    """The row of a parked task. `step` is JSON; `tried` counts the failed tries of that step."""

    id: UUID
    step: str
    error: str
    tried: int
    queue: str
    priority: int
    key: str | None
    created_at: datetime
    parked_at: datetime


def follow_failures(
    dsn: str, *, listens: bool, check: Callable[[], None] = lambda: None
) -> AsyncGenerator[ParkedTask, None]:
    """Yield the tasks that are parked from now on, without end. Waits while the database is unavailable. Raises
    `ConfigError` where the settings forbid to listen, `DatabaseRefused`, and what `check` raises in the event loop."""
    if not listens:
        raise ConfigError(
            "failures() listens for notifications, which PGTASK_NO_LISTEN (no-listen) forbids; give the client a "
            "direct connection, or look from time to time with: pgtask list --state parked"
        )
    return _follow(Follower(dsn), check)


async def _follow(follower: Follower, check: Callable[[], None]) -> AsyncGenerator[ParkedTask, None]:
    check()
    try:
        while True:
            for parked in await follower.read():
                yield parked
    finally:
        await follower.close()


class Follower:
    """A reader of the tasks that notifications name and, after it may have missed some, of the table."""

    def __init__(self, dsn: str) -> None:
        self._link = Link(dsn, "pgtask failures", on_open=self._start_listening)
        self._began = time.monotonic()
        self._named: dict[UUID, None] = {}  # by notifications, in their order
        self._taken: list[UUID] = []  # the named tasks whose rows are read now
        self._taken_at: datetime | None = None  # their time: tasks parked by then have been named
        self._yielded: dict[UUID, datetime] = {}
        self._first: datetime | None = None  # the start, by the clock of the server
        self._heard_until: datetime | None = None  # all tasks parked before have been yielded
        self._falls = 0
        self._place: tuple[datetime, UUID] | None = None  # the last row of the table read since it fell behind
        self._is_behind = True
        self._news = asyncio.Event()

    async def read(self) -> list[ParkedTask]:
        """Wait for the next parked tasks, and return them."""
        while True:
            if not (self._is_behind or self._taken):
                await self._take_named()
            if found := await (self._read_table() if self._is_behind else self._read_taken()):
                return self._filter_new(found)

    async def close(self) -> None:
        """End the connection."""
        await self._link.close()

    # --- events that may occur at any time

    async def _start_listening(self, connection: Any) -> None:
        connection.add_termination_listener(lambda _: self._news.set())
        await allow_far_times(connection)
        await connection.add_listener(CHANNEL, self._note_notification)
        self._fall_behind()

    def _note_notification(self, _connection: Any, _pid: int, _channel: str, payload: str) -> None:
        try:
            self._named[UUID(payload)] = None
        except ValueError:
            return  # not from our triggers
        if len(self._named) > MAX_NAMED:
            self._fall_behind()
        self._news.set()

    def _fall_behind(self) -> None:
        """Read the table, from the start if that was going on: notifications may have been missed."""
        self._named.clear()
        self._taken.clear()
        self._falls += 1
        self._place = None
        self._is_behind = True

    # --- reading

    async def _take_named(self) -> None:
        """Wait for notifications and take all of them, or detect that the connection was lost."""
        if not self._named and not self._news.is_set():
            try:
                async with asyncio.timeout(PING_INTERVAL):
                    await self._news.wait()
            except TimeoutError:
                pass
        self._news.clear()
        now = await self._read_clock()
        if not self._is_behind:
            self._taken, self._named, self._taken_at = list(self._named), {}, now

    async def _read_clock(self) -> datetime:
        [(now,)] = await self._link.run("failures/clock")
        return aware(now)

    async def _read_taken(self) -> list[ParkedTask]:
        falls, ids = self._falls, self._taken[:CHUNK_SIZE]
        rows = await self._link.run("failures/parked", ids) if ids else []
        if falls == self._falls:
            del self._taken[:CHUNK_SIZE]
            if not self._taken:
                self._caught_up(self._taken_at)
        return list(map(_parked_task, rows))

    async def _read_table(self) -> list[ParkedTask]:
        """Return the next page of the tasks parked since the last notification that has certainly arrived."""
        now = await self._read_clock()
        if self._first is None:
            self._first = self._heard_until = now - timedelta(seconds=time.monotonic() - self._began)
        assert self._heard_until is not None
        place = self._place or (max(self._first, self._heard_until - OVERLAP), UUID(int=0))
        falls = self._falls
        rows = list(map(_parked_task, await self._link.run("failures/since", *place, CHUNK_SIZE)))
        if falls == self._falls:
            self._is_behind = len(rows) == CHUNK_SIZE
            self._place = (rows[-1].parked_at, rows[-1].id) if self._is_behind else None
            if not self._is_behind:
                self._caught_up(now)
        return rows

    def _caught_up(self, now: datetime | None) -> None:
        assert now is not None
        self._heard_until = now
        self._yielded = {id: at for id, at in self._yielded.items() if at >= now - OVERLAP}

    def _filter_new(self, found: list[ParkedTask]) -> list[ParkedTask]:
        """Return the tasks that have not been yielded, and note them."""
        new = [one for one in found if self._yielded.get(one.id) != one.parked_at]
        self._yielded.update((one.id, one.parked_at) for one in new)
        return new


def _parked_task(row: Any) -> ParkedTask:
    values = plain_values(row)
    values["key"] = shown_key(values["step"], values["key"])
    return ParkedTask(**values)
