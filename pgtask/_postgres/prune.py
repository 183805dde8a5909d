"""Pruning: remove what has been kept for long enough.

Invariants: each batch is a transaction of its own and bounded, by tasks or runs and by what these have recorded, so
that no lock is held for long; the cut is drawn once, by the clock of the server, so that it comes to an end; what
somebody has locked is left.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from pgtask._ids import earliest_id
from pgtask._postgres.store import statement
from pgtask._postgres.tasks import transaction

__all__ = ["KINDS", "prune"]

_EARLIEST, _LATEST = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)
_FIRST, _LAST = UUID(int=0), UUID(int=2**128 - 1)
CHECKPOINTS = 10  # most in a batch, for each run that it may have
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


async def _prune_archive(connection: Any, before: datetime, batch: int) -> AsyncIterator[int]:
    """The oldest first, by an index on their age."""
    since = _EARLIEST
    count = batch
    while count >= batch:
        async with transaction(connection):
            count, reached = await connection.fetchrow(statement("prune_archive"), before, batch, since)
        since = reached or since
        yield count


async def _prune_parked(connection: Any, before: datetime, batch: int) -> AsyncIterator[int]:
    """The same. When the task of a run is gone, what is left of it is that of an ended one."""
    since = _EARLIEST
    is_more = True
    while is_more:
        async with transaction(connection):
            row = await connection.fetchrow(statement("prune_parked"), before, batch, since, CHECKPOINTS * batch)
        count, reached, is_more, rest = row
        since = reached or since
        yield count
        if rest is not None:
            async for _ in _prune_range(connection, _LATEST, batch, rest, UUID(int=rest.int + 1)):
                pass


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
            async for count, frees in _prune_range(connection, before, batch, first, end):
                again = again or frees
                yield count


async def _prune_range(
    connection: Any, before: datetime, batch: int, first: UUID, end: UUID
) -> AsyncIterator[tuple[int, bool]]:
    """Of each batch of the runs with ids from one on and before another: how many were removed, and whether a parent
    was among them that might have gone on."""
    following: UUID | None = first
    while following is not None:
        async with transaction(connection):
            row = await connection.fetchrow(statement("prune_runs"), before, batch, following, end, CHECKPOINTS * batch)
        count, frees, left, last = row
        following = left or (None if last is None else UUID(int=last.int + 1))
        yield count, frees


KINDS: dict[str, Callable[[Any, datetime, int], AsyncIterator[int]]] = {
    "archive": _prune_archive,
    "runs": _prune_runs,
    "parked": _prune_parked,
}
"""What can be pruned, and how: generators that say of each batch how much they have removed."""
