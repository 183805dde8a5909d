"""Pruning: the removal of old archived tasks, ended runs and parked tasks, in batches.

Invariants: each batch is a transaction of its own, bounded by tasks or runs and by their checkpoints, so that no lock
is held for long; the cut is drawn once, by the clock of the server, so that pruning ends; rows that another session
has locked are skipped.
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
CHECKPOINTS_PER_RUN = 10  # in a batch, for each run that it may hold
_MAX_AHEAD = timedelta(days=1)  # of our clock, for the clocks that make ids


async def prune(
    connection: Any, kind: str, *, older_than: timedelta, batch: int, removed: Callable[[int], None]
) -> int:
    """Remove all older rows of a kind; return their number. `removed` receives the number so far after each batch."""
    async with transaction(connection) as now:
        before = _EARLIEST if now - _EARLIEST < older_than else now - older_than
    total = 0
    async for count in KINDS[kind](connection, before, batch):
        total += count
        removed(total)
    return total


async def _prune_archive(connection: Any, before: datetime, batch: int) -> AsyncIterator[int]:
    """Remove archived tasks, the oldest first, by an index on their age."""
    since = _EARLIEST
    count = batch
    while count >= batch:
        async with transaction(connection):
            count, reached = await connection.fetchrow(statement("prune_archive"), before, batch, since)
        since = reached or since
        yield count


async def _prune_parked(connection: Any, before: datetime, batch: int) -> AsyncIterator[int]:
    """Remove parked tasks in the same way. Once the task of a run is gone, its records are those of an ended run."""
    since = _EARLIEST
    is_more = True
    while is_more:
        async with transaction(connection):
            row = await connection.fetchrow(
                statement("prune_parked"), before, batch, since, CHECKPOINTS_PER_RUN * batch
            )
        count, reached, is_more, rest = row
        since = reached or since
        yield count
        if rest is not None:
            async for _ in _prune_range(connection, _LATEST, batch, rest, UUID(int=rest.int + 1)):
                pass


async def _prune_runs(connection: Any, before: datetime, batch: int) -> AsyncIterator[int]:
    """Remove runs by their ids, which are made in the order of time: no run pays for an index on its end, and runs that
    began after the cut are not read. Ids of another making may have any order, so those beyond the present are read.

    Children come after their parents, and can be removed when these are gone: at the latest in another round.
    """
    beyond = earliest_id(datetime.now(UTC) + _MAX_AHEAD)
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
    """Remove the runs with ids from `first` on and before `end`. Yield for each batch the number of removed runs, and
    whether one of them was a parent that might have gone on."""
    following: UUID | None = first
    while following is not None:
        async with transaction(connection):
            row = await connection.fetchrow(
                statement("prune_runs"), before, batch, following, end, CHECKPOINTS_PER_RUN * batch
            )
        count, frees, left, last = row
        following = left or (None if last is None else UUID(int=last.int + 1))
        yield count, frees


async def _prune_actions(connection: Any, before: datetime, batch: int) -> AsyncIterator[int]:
    """Remove old rows of pg_task_actions."""
    following: int | None = 0
    is_more = True
    while is_more:
        async with transaction(connection):
            count, following, is_more = await connection.fetchrow(
                statement("prune_actions"), before, batch, following or 0
            )
        yield count


async def _prune_groups(connection: Any, before: datetime, batch: int) -> AsyncIterator[int]:
    """Remove ended groups, with their counts and results."""
    following = 0
    while True:
        async with transaction(connection):
            row = await connection.fetchrow(statement("groups/prune"), before, following, batch)
        if row is None:
            return
        count, following = row
        yield count


KINDS: dict[str, Callable[[Any, datetime, int], AsyncIterator[int]]] = {
    "archive": _prune_archive,
    "runs": _prune_runs,
    "parked": _prune_parked,
    "actions": _prune_actions,
    "groups": _prune_groups,
}
"""The kinds of rows that can be pruned; each generator yields the number of rows that a batch has removed."""
