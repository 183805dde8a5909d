"""Pruning: remove what has been kept for long enough.

Invariants: each batch is a transaction of its own and bounded, so that no lock is held for long; the cut is drawn once,
by the clock of the server, so that it comes to an end; what somebody has locked is left.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any
from uuid import UUID

from pgtask._ids import earliest_id
from pgtask._postgres.store import statement
from pgtask._postgres.tasks import transaction

__all__ = ["KINDS", "prune"]

_EARLIEST = datetime.min.replace(tzinfo=UTC)
_FIRST, _LAST = UUID(int=0), UUID(int=2**128 - 1)
_AHEAD = timedelta(days=1)  # that the clocks of those who make ids may be ahead of ours


async def prune(
    connection: Any, kind: str, *, older_than: timedelta, batch: int, removed: Callable[[int], None]
) -> int:
    """Remove all of a kind that is older; how many. `removed` is told after each batch how many they were so far."""
    async with transaction(connection) as now:
        before = _EARLIEST if now - _EARLIEST < older_than else now - older_than
    total = 0
    async for count in KINDS[kind](connection, before, batch):
        total += count
        removed(total)
    return total


async def _by_age(name: str, connection: Any, before: datetime, batch: int) -> AsyncIterator[int]:
    """The oldest first, by an index on their age."""
    since = _EARLIEST
    count = batch
    while count >= batch:
        async with transaction(connection):
            count, reached = await connection.fetchrow(statement(name), before, batch, since)
        since = reached or since
        yield count


async def _prune_runs(connection: Any, before: datetime, batch: int) -> AsyncIterator[int]:
    """By their ids, which are made in the order of time, so that no run pays for an index on its end: those that began
    after the cut are not looked at. Ids of another making may be anywhere, so what lies beyond the present is.

    Children come after their parents, and are free when these are gone: if not at once, by another round.
    """
    beyond = earliest_id(datetime.now(UTC) + _AHEAD)
    again = True
    while again:
        again = False
        for first, end in ((_FIRST, earliest_id(before)), (beyond, _LAST)):
            looked = batch
            while looked >= batch:
                async with transaction(connection):
                    row = await connection.fetchrow(statement("prune_runs"), before, batch, first, end)
                count, frees, looked, last = row
                again = again or frees
                first = first if last is None else UUID(int=last.int + 1)
                yield count


KINDS: dict[str, Callable[[Any, datetime, int], AsyncIterator[int]]] = {
    "archive": partial(_by_age, "prune_archive"),
    "runs": _prune_runs,
    "parked": partial(_by_age, "prune_parked"),
}
"""What can be pruned, and how: generators that say of each batch how much they have removed."""
