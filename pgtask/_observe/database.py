"""What the exporter asks the database: whether it answers, and how much waits.

Invariant: no question takes longer than `PATIENCE`, and questions at the same time share one answer.
"""

from __future__ import annotations

import asyncio
import time

import msgspec

from pgtask._log import EventLog
from pgtask._postgres.store import Link
from pgtask.errors import DatabaseError

__all__ = ["DatabaseProbe", "QueueDepth"]

log = EventLog("pgtask.exporter")

PATIENCE = 2.0  # seconds
FRESH = 0.5  # seconds for which an answer counts as new


class QueueDepth(msgspec.Struct, frozen=True):
    """The tasks of a queue that are in one state, and the seconds for which the oldest has been due; see
    `pgtask_depth` in SQL."""

    queue: str
    state: str
    tasks: int
    is_estimate: bool
    oldest_due: float | None


class DatabaseProbe:
    """The database of a fleet, over a connection of the exporter. Make it and call it on one loop."""

    def __init__(self, dsn: str, *, pooled: bool) -> None:
        limit = {"statement_timeout": f"{1000 * PATIENCE:.0f}ms"}
        self._link = Link(dsn, "pgtask exporter", pooled=pooled, settings=limit)
        self._turn = asyncio.Lock()
        self._pinged_at = self._counted_at = float("-inf")  # monotonic seconds
        self._error: str | None = None
        self._depth: list[QueueDepth] | None = None

    async def ping(self) -> str | None:
        """Return why the database does not answer, or None if it does."""
        async with self._turn:
            if time.monotonic() - self._pinged_at > FRESH:
                _, self._error = await self._ask("server_time", 0.0)
                self._pinged_at = time.monotonic()
            return self._error

    async def depth(self) -> list[QueueDepth] | None:
        """Return how much waits, or None if the database does not say so in time."""
        async with self._turn:
            if time.monotonic() - self._counted_at > FRESH:
                rows, self._error = await self._ask("depth")
                self._depth = None if rows is None else [QueueDepth(*row) for row in rows]
                self._counted_at = self._pinged_at = time.monotonic()
            return self._depth

    async def _ask(self, name: str, *parameters: float) -> tuple[list[tuple] | None, str | None]:  # type: ignore[type-arg]
        """Return the rows of a statement, or None and the reason."""
        try:
            async with asyncio.timeout(PATIENCE):
                return await self._link.once(name, *parameters), None
        except TimeoutError:
            return None, f"no answer within {PATIENCE:g} s"
        except DatabaseError as error:
            return None, str(error)
