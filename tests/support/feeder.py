"""A feeder, which gives a fleet work for as long as a block runs, however fast or slow the fleet is."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import apps
import asyncpg

from pgtask import Client

BATCH = 500
OPEN_BURST = ("--burst", "--burst-horizon", "600")
"""A burst of a fleet that is fed: it does not end before the feeder."""


class Feed:
    """A thread that enqueues tasks. `count` is the number of all that it has enqueued."""

    def __init__(self, dsn: str, kind: Callable[[int], Any]) -> None:
        self._dsn, self._kind = dsn, kind
        self.count = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._feed()))

    def start(self) -> None:
        asyncio.run(self._put_last())
        self._thread.start()

    def end(self) -> None:
        """Enqueue no more, and let the last task be due."""
        if not self._over.is_set():
            self._over.set()
            self._thread.join(30)
            asyncio.run(self._release_last())

    async def _put_last(self) -> None:
        async with Client(self._dsn) as client:
            await client.delay(self._kind(-1), timedelta(seconds=500))
        self.count += 1

    async def _feed(self) -> None:
        db = await asyncpg.connect(self._dsn)
        async with Client(self._dsn) as client:
            while not self._over.is_set():
                if await db.fetchval("SELECT count(*) FROM pg_task") <= BATCH:
                    await client.enqueue_many([self._kind(self.count + number) for number in range(BATCH)])
                    self.count += BATCH
                self._over.wait(0.005)
        await db.close()

    async def _release_last(self) -> None:
        db = await asyncpg.connect(self._dsn)
        await db.execute("UPDATE pg_task SET wakeup_at = now() WHERE wakeup_at > now() + interval '60 s'")
        await db.close()


@contextlib.contextmanager
def feeding(dsn: str, kind: Callable[[int], Any] = apps.First) -> Iterator[Feed]:
    """Enqueue tasks until `end`, or the end of the block, so that a batch or two are always due.

    One task is due only then: it keeps a burst of `OPEN_BURST` open.
    """
    feed = Feed(dsn, kind)
    feed.start()
    try:
        yield feed
    finally:
        feed.end()
