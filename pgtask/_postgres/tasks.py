"""The operator's statements on tasks that are named: show them, retry them, cancel them; and stop the workers.

Invariants: nothing here scans the table. A task under a live lease is changed by force only; the token of its worker
then matches no row, and the outcome is dropped.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any, TypeVar
from uuid import UUID

import asyncpg
import msgspec

from pgtask._postgres.connection import connect, map_errors
from pgtask._postgres.migrate import check_schema
from pgtask._postgres.store import statement

__all__ = [
    "TaskRow",
    "Verdict",
    "again_after_deadlock",
    "aware",
    "cancel",
    "describe",
    "find_ids",
    "open_connection",
    "plain_values",
    "retry",
    "show_tasks",
    "stop_workers",
    "transaction",
]


T = TypeVar("T")


class TaskRow(msgspec.Struct, frozen=True, kw_only=True):
    """A row of `pg_task` as it was at `seen_at`, by the clock of the server. An infinite time is the year 9999 or 1."""

    id: UUID
    state: str
    step: str
    queue: str
    priority: int
    key: str | None
    tried: int
    claims: int
    wakeup_at: datetime
    created_at: datetime
    updated_at: datetime
    locked_by: UUID | None
    lock_expires_at: datetime | None
    error: str | None
    seen_at: datetime


class Verdict(msgspec.Struct, frozen=True):
    """What became of one task that was to be changed: nothing unless `is_done`. The rest is how it was just before."""

    id: UUID
    is_done: bool
    was_there: bool
    leased_until: datetime | None
    seen_at: datetime


@asynccontextmanager
async def open_connection(
    dsn: str, *, name: str, pooled: bool = False, needs_schema: bool = True
) -> AsyncIterator[Any]:
    """A connection to a database that has our schema. Raises `SchemaError` and other `DatabaseError`s."""
    connection = await connect(dsn, name=name, pooled=pooled)
    try:
        if needs_schema:
            await check_schema(connection)
        with map_errors():
            yield connection
    finally:
        try:
            await connection.close(timeout=2)
        except (TimeoutError, OSError):
            connection.terminate()


@asynccontextmanager
async def transaction(connection: Any, *, readonly: bool = False) -> AsyncIterator[datetime]:
    """A transaction that reads tables by their indexes only and does not wait for ever. Yields its time."""
    isolation = "repeatable_read" if readonly else "read_committed"
    async with connection.transaction(isolation=isolation, readonly=readonly):
        settings = await connection.fetchrow(statement("index_scans"))
        yield settings["now"]


async def again_after_deadlock(connection: Any, work: Callable[[], Awaitable[T]]) -> T:
    """Do it once more whenever the server has undone it to end a deadlock; not in a transaction of the caller's, which
    has failed with it. Whoever names several tasks locks them in the order of their ids; who parks a child, the child
    and then its parent."""
    while True:
        try:
            return await work()
        except asyncpg.DeadlockDetectedError:
            if connection.is_in_transaction():
                raise


# --- reading ------------------------------------------------------------------------------------------------


async def find_ids(connection: Any, first: UUID, last: UUID, *, limit: int) -> list[UUID]:
    """The ids between two, in their order."""
    async with transaction(connection, readonly=True):
        rows = await connection.fetch(statement("find_prefix"), first, last, limit)
    return [row["id"] for row in rows]


async def show_tasks(connection: Any, ids: Sequence[UUID]) -> list[TaskRow]:
    """All of the tasks that are there, in the order of `ids`."""
    async with transaction(connection, readonly=True):
        return await describe(connection, ids, None)


async def describe(connection: Any, ids: Sequence[UUID], characters: int | None) -> list[TaskRow]:
    """As `show_tasks`, within the caller's transaction; of steps and errors only the first `characters`."""
    rows = await connection.fetch(statement("describe"), ids, characters)
    return [TaskRow(**plain_values(row)) for row in rows]


def plain_values(row: Any) -> dict[str, Any]:
    """The columns of a row as values of the standard library, infinite times as ones that can be compared."""
    return {name: _plain(value) for name, value in row.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, UUID):
        return UUID(int=value.int)
    return aware(value) if isinstance(value, datetime) else value


def aware(time: datetime) -> datetime:
    """asyncpg's infinities are naive, all other times are not."""
    return time if time.tzinfo else time.replace(tzinfo=UTC)


# --- changing -----------------------------------------------------------------------------------------------


async def retry(connection: Any, ids: Sequence[UUID]) -> list[Verdict]:
    """Make tasks due, without an error and with all their retries, unless leased. In the order of `ids`."""
    return await _change(connection, ids, "retry", ids)


async def cancel(connection: Any, ids: Sequence[UUID], *, force: bool) -> list[Verdict]:
    """Remove tasks, leased ones only by `force`. In the order of `ids`."""
    return await _change(connection, ids, "cancel", ids, force)


async def _change(connection: Any, ids: Sequence[UUID], name: str, *args: Any) -> list[Verdict]:
    async def change() -> list[Any]:
        async with transaction(connection):
            rows: list[Any] = await connection.fetch(statement(name), *args)
            return rows

    by_id = {row["id"]: row for row in await again_after_deadlock(connection, change)}
    names = Verdict.__struct_fields__
    return [Verdict(**{name: _plain(by_id[task][name]) for name in names}) for task in dict.fromkeys(ids)]


async def stop_workers(connection: Any) -> None:
    """Tell all workers of this database, on every host, to drain."""
    async with asyncio.timeout(30):
        await connection.execute(statement("stop_workers"))
