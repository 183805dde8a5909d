"""The groups of a client in Postgres: their start, their status, their results and their cancellation.

Invariants: a group and its members are inserted in one transaction, or not at all; a call reads and writes a bounded
number of rows, but for the start.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, NamedTuple
from uuid import UUID

from pgtask._copy import Source
from pgtask._ids import TaskId, TaskIds, first_id
from pgtask._postgres.bulk import insert_many
from pgtask._postgres.connection import map_errors
from pgtask._postgres.refusals import refusals
from pgtask._postgres.store import statement
from pgtask._postgres.transactions import atomically, planned_by_index
from pgtask._validate import ItemEncoder, NewRow
from pgtask.errors import EnqueueError

__all__ = ["KINDS", "MAX_AT_ONCE", "NewGroup", "PostgresGroups", "cancel_group", "end_named", "read_rows"]

MAX_AT_ONCE = 5_000
"""Members that a cancel removes at once."""
KINDS = ("started", "added", "parked")
"""The kinds of members that are in the table, as purge.sql has them."""
_FIRST = UUID(int=0)


class NewGroup(NamedTuple):
    """A group to start; `then` is the step at its end."""

    name: str
    results: bool
    on_parked: str
    then: NewRow | None

    @property
    def columns(self) -> tuple[Any, ...]:
        """The parameters of start.sql."""
        step = (None, None, None) if self.then is None else (self.then.step, *self.then.place[:2])
        return self.name, self.results, self.on_parked, *step


async def read_rows(connection: Any, names: list[str] | None, limit: int) -> list[Any]:
    """Return the rows of status.sql."""
    async with planned_by_index(connection):
        rows: list[Any] = await connection.fetch(statement("groups/status"), names, limit)
    return rows


async def _end_groups(connection: Any, ids: list[int]) -> None:
    """End those of the groups of which nothing waits or runs."""
    async with planned_by_index(connection):
        await connection.fetch(statement("groups/end"), ids, None)


async def end_named(connection: Any, names: list[str]) -> None:
    """The same by names."""
    rows = [await connection.fetchrow(statement("groups/id"), name) for name in names]
    await _end_groups(connection, [row[0] for row in rows if row is not None])


async def cancel_group(connection: Any, name: str, then: bool) -> bool | None:
    """Cancel a group, and remove the first of its members, so that a small group needs no worker. False if it has
    ended, None if there is none."""
    row = await connection.fetchrow(statement("groups/cancel"), name, then)
    if row is None or not row[1]:
        return None if row is None else False
    async with atomically(connection), planned_by_index(connection):
        for kind in KINDS:
            await connection.fetch(statement("groups/purge"), row[0], MAX_AT_ONCE, _FIRST, kind)
    await _end_groups(connection, [row[0]])
    return True


def _is_new(id: UUID) -> bool:
    return not isinstance(id, TaskId) or id.is_new


class PostgresGroups:
    """The statements on the groups of one client, whose store opens the connections."""

    def __init__(self, connection: Callable[[Any], AbstractAsyncContextManager[Any]]) -> None:
        self._open = connection

    @asynccontextmanager
    async def _connection(self, conn: Any = None) -> AsyncIterator[Any]:
        async with self._open(conn) as connection:
            with map_errors():
                yield connection

    async def start_group(self, group: NewGroup, source: Source, encode: ItemEncoder, conn: Any) -> int:
        """Insert a group and its members; return how many there are. One without members ends at once."""
        async with self._connection(conn) as connection:
            with refusals():
                async with atomically(connection):
                    id = await connection.fetchval(statement("groups/start"), *group.columns)
                    if id is None:
                        raise EnqueueError(
                            f"there is a group {group.name!r} already: choose another name, or, if that has ended, "
                            "remove it by pgtask prune --groups"
                        )
                    ids = await insert_many(connection, source, encode, id, first := first_id())
                    total = len(ids) if isinstance(ids, TaskIds) else sum(map(_is_new, ids))
                    bounds = UUID(int=first), UUID(int=first + len(ids))
                    await connection.execute(statement("groups/started"), id, total, *bounds)
                    if not total:
                        await _end_groups(connection, [id])
        return total

    async def read_groups(self, names: list[str] | None, limit: int) -> list[Any]:
        async with self._connection() as connection:
            return await read_rows(connection, names, limit)

    async def find_group(self, name: str) -> Any:
        async with self._connection() as connection:
            return await connection.fetchrow(statement("groups/id"), name)

    async def read_results(self, group: int, after: UUID, limit: int) -> list[Any]:
        async with self._connection() as connection, planned_by_index(connection):
            rows: list[Any] = await connection.fetch(statement("groups/results"), group, after, limit)
            return rows

    async def cancel_group(self, name: str, then: bool, conn: Any) -> bool | None:
        async with self._connection(conn) as connection:
            return await cancel_group(connection, name, then)

    async def end_groups(self, names: list[str]) -> None:
        async with self._connection() as connection:
            await end_named(connection, names)
