"""writer: sends batches of entries, one statement each, for the pump and the journal of a worker.

Invariants: no batch holds up those behind it for longer than one statement may take. There is one answer to each thing
that can happen to a batch:

- *written*: the batch learns which of its entries were, and which had lost their lease.
- *unavailable*: the `Link` waits for the database, and sends the batch again.
- *locked*, by another session: the batch goes aside, where the entries whose rows are free are written at once, and the
  others every second.
- *too slow*: the batch goes aside, and is halved there until the entry that is too slow is alone, and is rejected.
- *refused*, since the database does not take the data: likewise.

Aside, a connection of its own writes the batch, so that the ordinary traffic goes on. Batches are bounded by their
rows and their characters, and get smaller while the server is slow.
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import Any
from uuid import UUID

from pgtask._log import EventLog
from pgtask._postgres.store import Link
from pgtask._sparing import SparingLog
from pgtask.errors import DataRefused, RowsLocked, StatementTimeout

__all__ = ["ASIDE_SETTINGS", "MAX_SIZE", "MAX_TIME", "SHARED_SETTINGS", "Aside", "WriteBatch", "Writer"]

log = EventLog("pgtask.writer")

MAX_ROWS = 5000  # in one statement, unless one entry alone has more
MAX_SIZE = 16 * 1024 * 1024
"""Characters of one statement, unless one entry alone has more."""
MAX_TIME = 10
"""Seconds of one statement."""
MAX_TRIES = 2  # more tries aside of an entry that is too slow alone
SLOW, FAST = 1.0, 0.25  # seconds of a statement after which the next ones get smaller, or larger again
LOCKED_RETRY = 1.0  # seconds between two tries to write rows that another session has locked
MAX_SEARCH = 1.0  # seconds in which one try may look for a lock that the rows of the batch do not show
IDLE = 10.0  # seconds after which the connection aside is closed

SHARED_SETTINGS = {"statement_timeout": f"{MAX_TIME}s", "lock_timeout": "200ms"}
"""The settings of a connection that all tasks of a worker share."""
ASIDE_SETTINGS = {"statement_timeout": f"{MAX_TIME}s", "lock_timeout": "50ms"}

Failure = RowsLocked | StatementTimeout | DataRefused


class WriteBatch(ABC):
    """Entries that one statement writes."""

    is_certain = True
    """False once the server may have carried out an attempt without our knowing."""
    tries = 0
    """The statements that were too slow for the only entry."""

    @property
    @abstractmethod
    def statement(self) -> str:
        """The name of the statement."""

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    def rows(self) -> int:
        """The rows that the statement writes: one for each entry, unless an entry makes others."""
        return len(self)

    @property
    @abstractmethod
    def size(self) -> int:
        """The characters of all entries."""

    @abstractmethod
    def parameters(self) -> Sequence[Any]:
        """Return the parameters of the statement."""

    @abstractmethod
    def task_ids(self) -> list[UUID]:
        """Return the tasks whose rows it writes."""

    @abstractmethod
    def halves(self) -> tuple[WriteBatch, WriteBatch]:
        """Return the same entries in two batches, each of them shorter."""

    @abstractmethod
    def divide(self, ids: set[UUID]) -> tuple[WriteBatch, WriteBatch]:
        """Return the same entries in two batches: of the tasks in `ids`, and of the others."""

    @abstractmethod
    async def answer(self, rows: list[Any], link: Link) -> None:
        """Take the answer of the statement. `link` is that over which it came."""

    @abstractmethod
    def go_aside(self) -> None:
        """Note that its entries are written later than others."""

    @abstractmethod
    def reject(self, error: DataRefused) -> WriteBatch | None:
        """Give up the only entry; return a batch that says so in the database, if there is one."""

    def inherit(self, whole: WriteBatch) -> None:
        """Take over what is known of the batch of which this one is a part."""
        self.is_certain, self.tries = whole.is_certain, whole.tries

    async def send(self, link: Link) -> None:
        """Write the batch and take the answer. Waits while the database is unavailable.

        Raises `RowsLocked`, `StatementTimeout` and `DataRefused`, if it was not written, and `DatabaseRefused`."""

        def become_unsure() -> None:
            self.is_certain = False

        raises = (RowsLocked, StatementTimeout)
        rows = await link.run(self.statement, *self.parameters(), on_loss=become_unsure, raises=raises)
        await self.answer(rows, link)


class Writer:
    """Writes batches over `link`, one after the other, and gives those to `aside` that would hold up the others."""

    def __init__(self, link: Link, aside: Aside) -> None:
        self._link = link
        self._aside = aside
        self._max_rows = MAX_ROWS

    async def write(self, batch: WriteBatch) -> None:
        """Write a batch, or set it aside. Waits while the database is unavailable.

        Raises `DatabaseRefused`. If it is cancelled the batch may or may not be written; the leases then expire.
        """
        waiting = deque([batch])
        while waiting:
            part = waiting.popleft()
            if len(part) > 1 and (part.rows > self._max_rows or part.size > MAX_SIZE):
                waiting.extendleft(reversed(part.halves()))
                continue
            began = time.monotonic()
            try:
                await part.send(self._link)
            except (RowsLocked, StatementTimeout, DataRefused) as error:
                self._aside.add(part, error)
            if part.is_certain:  # else the time includes an outage
                self._adapt(part.rows, time.monotonic() - began)

    def _adapt(self, rows: int, seconds: float) -> None:
        """Send fewer rows at a time while statements are slow, since each holds up those behind it."""
        if seconds > SLOW and rows > 1:
            self._max_rows = max(1, min(rows, self._max_rows) // 2)
        elif seconds < FAST and self._max_rows < MAX_ROWS:
            self._max_rows = min(MAX_ROWS, 2 * self._max_rows)


class Aside:
    """Writes the batches that would hold up others. It opens its connection, `link`, when there is one.

    Batches have their turn one after the other, and what is left of one after a statement goes behind the others: so
    the entries beside one that is too slow wait for few of its statements.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self._work = asyncio.Event()
        self._queue: deque[tuple[WriteBatch, Failure | None]] = deque()  # and why its last statement has failed
        self._locked: list[WriteBatch] = []
        self._retry_at = float("inf")
        self._is_idle = asyncio.Event()  # all that there is was tried
        self._is_idle.set()
        self._locked_log = SparingLog(log, logging.WARNING, "database.locked")
        self._slow_log = SparingLog(log, logging.WARNING, "database.slow")

    def add(self, batch: WriteBatch, error: Failure) -> None:
        """Take over a batch that was not written because of `error`."""
        if not isinstance(error, DataRefused):
            said = self._locked_log if isinstance(error, RowsLocked) else self._slow_log
            ids = batch.task_ids()
            task = {"task": ids[0]} if len(ids) == 1 else {}
            said.log_or_count(statement=batch.statement, entries=len(batch), **task, error=str(error))
        batch.go_aside()
        self._queue.append((batch, error))
        self._is_idle.clear()
        self._work.set()

    async def settle(self) -> None:
        """Try everything once more, now, and wait until it is written, rejected, or found to be still locked."""
        if self._locked:
            self._retry_at = 0.0
            self._is_idle.clear()
            self._work.set()
        await self._is_idle.wait()

    async def run(self) -> None:
        """Write what is added, until cancelled. Raises `DatabaseRefused`."""
        try:
            while True:
                await self._wait_for_work()
                self._is_idle.clear()
                if time.monotonic() >= self._retry_at:
                    self._queue.extend((batch, RowsLocked("it was locked")) for batch in self._locked)
                    self._locked, self._retry_at = [], float("inf")
                while self._queue:
                    await self._advance(*self._queue.popleft())
        finally:
            self._locked_log.log_count()
            self._slow_log.log_count()
            await self._link.close()

    async def _wait_for_work(self) -> None:
        """Wait until a batch is added, or until it is time to try those that were locked."""
        while not self._queue and (pause := self._retry_at - time.monotonic()) > 0:
            self._is_idle.set()
            self._work.clear()
            try:
                async with asyncio.timeout(min(pause, IDLE)):
                    await self._work.wait()
            except TimeoutError:
                if not self._locked:
                    await self._link.close()

    async def _advance(self, batch: WriteBatch, error: Failure | None) -> None:
        """Send the next statement for a batch whose last one has failed because of `error`, if it has."""
        if error is None:
            await self._send(batch)
        elif isinstance(error, RowsLocked):
            await self._send_unlocked(batch)
        elif len(batch) > 1:
            self._queue.extend((half, None) for half in batch.halves())
        elif isinstance(error, StatementTimeout) and batch.tries < MAX_TRIES:
            batch.tries += 1
            self._queue.append((batch, None))
        else:
            slow = f"it takes longer than {MAX_TIME} s to write; is a trigger of yours slow? ({error})"
            reason = error if isinstance(error, DataRefused) else DataRefused(slow)
            if (rejection := batch.reject(reason)) is not None:
                self._queue.append((rejection, None))

    async def _send(self, batch: WriteBatch) -> None:
        try:
            await batch.send(self._link)
        except (RowsLocked, StatementTimeout, DataRefused) as error:
            self._queue.append((batch, error))

    async def _send_unlocked(self, batch: WriteBatch) -> None:
        """Write the entries whose rows are free, and keep the others for later."""
        locked = {row[0] for row in await self._link.run("locked", batch.task_ids())}
        blocked, free = batch.divide(locked)
        if len(blocked):
            self._keep(blocked)
            if len(free):
                await self._send(free)
        else:
            await self._search_lock(free, until=time.monotonic() + MAX_SEARCH)

    async def _search_lock(self, batch: WriteBatch, *, until: float) -> None:
        """Write all entries but those that meet a lock of another row or table, by a trigger for one. Searching for
        them, by halves, takes a bounded time; the next try goes on with it."""
        try:
            await batch.send(self._link)
        except RowsLocked:
            if len(batch) == 1 or time.monotonic() > until:
                self._keep(batch)
                return
            for half in batch.halves():
                await self._search_lock(half, until=until)
        except (StatementTimeout, DataRefused) as error:
            self._queue.append((batch, error))

    def _keep(self, batch: WriteBatch) -> None:
        self._locked.append(batch)
        self._retry_at = min(self._retry_at, time.monotonic() + LOCKED_RETRY)
