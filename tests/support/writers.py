"""The flush and the journal of a worker, with the connections that they need."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from pgtask._fastpath import Leases, Outcomes, TaskLease
from pgtask._postgres.store import Link
from pgtask._postgres.times import allow_far_times
from pgtask._postgres.writer import ASIDE_SETTINGS, Aside
from pgtask._worker.flush import Flush
from pgtask._workflow.journal import PostgresJournal


class Flushing:
    """Make it with `flushing`."""

    def __init__(self, dsn: str) -> None:
        self.link = Link(dsn, "flusher")
        self.leases = Leases()
        self.aside = Aside(Link(dsn, "flusher aside", settings=ASIDE_SETTINGS))
        self.flush = Flush(self.link, self.leases, self.aside, lambda: None)

    async def write(self, outcomes: Outcomes) -> list[TaskLease]:
        """Flush, wait until what was set aside is written or found to be locked, and return the leases that go on."""
        await self.flush.flush(outcomes)
        return await self.settle()

    async def settle(self) -> list[TaskLease]:
        """Try what is locked once more, and return the leases that go on."""
        await self.aside.settle()
        return self.flush.take_continuing() + self.flush.take_returned()


@asynccontextmanager
async def running(flushing: Flushing) -> AsyncIterator[None]:
    """Run the writer aside, and close the connections at the end."""
    beside = asyncio.create_task(flushing.aside.run())
    try:
        yield
    finally:
        beside.cancel()
        await asyncio.gather(beside, return_exceptions=True)
        await flushing.link.close()


@asynccontextmanager
async def flushing(dsn: str) -> AsyncIterator[Flushing]:
    made = Flushing(dsn)
    async with running(made):
        yield made


@asynccontextmanager
async def journaling(dsn: str, link: Link) -> AsyncIterator[PostgresJournal]:
    """Run a journal that writes over `link`."""
    aside = Aside(Link(dsn, "journal aside", on_open=allow_far_times, settings=ASIDE_SETTINGS))
    journal = PostgresJournal(link, aside, due_in=lambda _: None)
    writing = [asyncio.create_task(journal.run()), asyncio.create_task(aside.run())]
    try:
        yield journal
    finally:
        for task in writing:
            task.cancel()
        await asyncio.gather(*writing, return_exceptions=True)
