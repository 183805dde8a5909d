"""Pruning: remove what has been kept for long enough.

Invariants: each batch is a transaction of its own and bounded, so that no lock is held for long; the cut is drawn once,
by the clock of the server, so that it comes to an end; what somebody has locked is left.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from pgtask._postgres.store import statement
from pgtask._postgres.tasks import transaction

__all__ = ["KINDS", "prune"]

KINDS = {"archive": "prune_archive", "parked": "prune_parked"}
"""What can be pruned, each by a statement with these parameters and columns."""

_EARLIEST = datetime.min.replace(tzinfo=UTC)


async def prune(
    connection: Any, kind: str, *, older_than: timedelta, batch: int, removed: Callable[[int], None]
) -> int:
    """Remove all of a kind that is older; how many. `removed` is told after each batch how many they were so far."""
    total: int = 0
    since = _EARLIEST
    before: datetime | None = None
    while True:
        async with transaction(connection) as now:
            if before is None:
                before = _EARLIEST if now - _EARLIEST < older_than else now - older_than
            count, reached = await connection.fetchrow(statement(KINDS[kind]), before, batch, since)
        total += count
        since = reached or since
        removed(total)
        if count < batch:
            return total
