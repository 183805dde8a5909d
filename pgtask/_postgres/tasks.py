"""The operator's statements on named tasks: show, retry and cancel them; and stop the workers.

Invariants: no statement scans the table. Only `force` changes a task under a live lease; the token of its worker then
matches no row, and the outcome is dropped.
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

from pgtask._placement import shown_key
from pgtask._postgres.connection import connect, map_errors
from pgtask._postgres.migrate import check_schema
from pgtask._postgres.store import statement
from pgtask._postgres.times import allow_far_times
from pgtask._postgres.transactions import planned_by_index
from pgtask._progress import Progress
from pgtask.errors import DatabaseRefused, SchemaError

__all__ = [
    "TaskChange",
    "TaskRow",
    "aware",
    "cancel_tasks",
    "change_tasks",
    "describe",
    "find_ids",
    "find_step",
    "in_transaction",
    "open_connection",
    "plain_values",
    "retry_on_deadlock",
    "retry_tasks",
    "show_tasks",
    "stop_workers",
    "transaction",
]


T = TypeVar("T")
MAX_TRIES = 20  # of work that the server undoes: each time another transaction has made progress


class TaskRow(msgspec.Struct, frozen=True, kw_only=True):
    """A row of `pg_task` as it was at `seen_at`, by the clock of the server. An infinite time is the year 9999 or 1,
    and one that Python cannot hold is a `FarTime`. A task that waits behind another one has the time `behind`, at which
    it is due once that is gone, and the id of that. One that waits for a limit, or runs under it, has the key of that,
    and the time `limit_at` at which it was due."""

    id: UUID
    state: str
    step: str
    queue: str
    priority: int
    key: str | None
    tried: int
    claims: int
    position: int
    progress: Progress | None = None
    wakeup_at: datetime
    created_at: datetime
    updated_at: datetime
    locked_by: UUID | None
    lock_expires_at: datetime | None
    behind: datetime | None
    behind_id: UUID | None
    expires_at: datetime | None
    limit_key: str | None = None
    limit_at: datetime | None = None
    error: str | None
    seen_at: datetime


class TaskChange(msgspec.Struct, frozen=True):
    """The change of one named task: `is_done` or not. The other fields show the task just before."""

    id: UUID
    is_done: bool
    was_there: bool
    leased_until: datetime | None
    seen_at: datetime


@asynccontextmanager
async def open_connection(
    dsn: str, *, name: str, pooled: bool = False, needs_schema: bool = True
) -> AsyncIterator[Any]:
    """Open a connection to a database that has our schema. Raises `SchemaError` and other `DatabaseError`s."""
    connection = await connect(dsn, name=name, pooled=pooled)
    try:
        if needs_schema:
            await check_schema(connection)
        with map_errors():
            await allow_far_times(connection)
            yield connection
    finally:
        try:
            await connection.close(timeout=2)
        except (TimeoutError, OSError):
            connection.terminate()


@asynccontextmanager
async def transaction(connection: Any, *, readonly: bool = False) -> AsyncIterator[datetime]:
    """Open a transaction that reads tables by their indexes only and waits for a bounded time. Yields its time."""
    isolation = "repeatable_read" if readonly else "read_committed"
    async with connection.transaction(isolation=isolation, readonly=readonly):
        settings = await connection.fetchrow(statement("index_scans"))
        yield settings["now"]


@asynccontextmanager
async def in_transaction(connection: Any) -> AsyncIterator[None]:
    """Read tables by their indexes only: in the caller's transaction, whose settings return at the end, or in ours."""
    context: Any = planned_by_index if connection.is_in_transaction() else transaction
    async with context(connection):
        yield


async def retry_on_deadlock(connection: Any, work: Callable[[], Awaitable[T]]) -> T:
    """Repeat `work` each time that the server has undone it to end a deadlock, or because another transaction came
    first; not in a transaction of the caller's, which has failed with it.

    A statement that names several tasks locks them in the order of their ids; one that parks a child locks the child
    and then its parent."""
    for _ in range(MAX_TRIES - 1):
        try:
            return await work()
        except (asyncpg.DeadlockDetectedError, asyncpg.SerializationError):
            if connection.is_in_transaction():
                raise
    return await work()


# --- reading ------------------------------------------------------------------------------------------------


async def find_ids(
    connection: Any, first: UUID, last: UUID, ending: str | None, *, limit: int, runs: bool = False
) -> list[UUID]:
    """Return the ids of tasks, or of `runs`, that lie between two or have this ending, in their order."""
    where = "runs/" if runs else ""
    async with transaction(connection, readonly=True):
        rows = await connection.fetch(statement(f"{where}find_prefix"), first, last, limit)
        if ending is not None:
            rows += await connection.fetch(statement(f"{where}find_ending"), ending, limit)
    return sorted({UUID(int=row["id"].int) for row in rows})


async def show_tasks(connection: Any, ids: Sequence[UUID]) -> list[TaskRow]:
    """Return whole rows of the tasks that exist, in the order of `ids`."""
    async with transaction(connection, readonly=True):
        return await describe(connection, ids, None)


async def describe(connection: Any, ids: Sequence[UUID], characters: int | None) -> list[TaskRow]:
    """Return rows as `show_tasks` does, in the caller's transaction, with `characters` of steps and errors."""
    rows = await connection.fetch(statement("describe"), ids, characters)
    return [_task_row(plain_values(row)) for row in rows]


def _task_row(values: dict[str, Any]) -> TaskRow:
    if values["progress"] is not None:
        values["progress"] = msgspec.json.decode(values["progress"], type=Progress)
    values["key"] = shown_key(values["step"], values["key"])
    return TaskRow(**values)


def plain_values(row: Any) -> dict[str, Any]:
    """Return the columns of a row as values of the standard library, with infinite times that can be compared."""
    return {name: _plain_value(value) for name, value in row.items()}


def _plain_value(value: Any) -> Any:
    if isinstance(value, UUID):
        return UUID(int=value.int)
    return aware(value) if isinstance(value, datetime) else value


def aware(time: datetime) -> datetime:
    """Return the time with a zone: the infinities of asyncpg have none, all other times do."""
    return time if time.tzinfo else time.replace(tzinfo=UTC)


async def find_step(connection: Any, task: UUID) -> str | None:
    """Return the step of a task; None if it is gone."""
    step: str | None = await connection.fetchval(statement("step"), task)
    return step


# --- changing -----------------------------------------------------------------------------------------------


async def retry_tasks(connection: Any, ids: Sequence[UUID]) -> list[TaskChange]:
    """Make tasks due, without an error and with all their retries, unless leased. In the order of `ids`."""
    return await change_tasks(connection, ids, "retry", ids)


async def cancel_tasks(connection: Any, ids: Sequence[UUID], *, force: bool) -> list[TaskChange]:
    """Remove tasks, leased ones only by `force`. In the order of `ids`."""
    return await change_tasks(connection, ids, "cancel", ids, force)


async def change_tasks(connection: Any, ids: Sequence[UUID], name: str, *args: Any) -> list[TaskChange]:
    """Change tasks by a statement that returns the columns of retry.sql. In the order of `ids`."""

    async def send_change() -> list[Any]:
        async with in_transaction(connection):
            rows: list[Any] = await connection.fetch(statement(name), *args)
            return rows

    by_id = {row["id"]: row for row in await retry_on_deadlock(connection, send_change)}
    names = TaskChange.__struct_fields__
    return [TaskChange(**{name: _plain_value(by_id[task][name]) for name in names}) for task in dict.fromkeys(ids)]


async def stop_workers(connection: Any) -> tuple[str | None, int]:
    """Tell all workers of this schema, on every host, to drain. Return the name of the schema, if workers of other
    schemas go on, and the number of workers of the database that listen.

    Where the table has not been migrated that far, all workers of the database are told, as in pg_task. Raises
    `DatabaseRefused` for a role that may not, and `SchemaError` where only other schemas have a table.
    """
    async with asyncio.timeout(30):
        try:
            with map_errors():
                payload = str(await connection.fetchval(statement("stop_workers")))
        except DatabaseRefused as error:
            if not isinstance(error.__cause__, asyncpg.UndefinedFunctionError):
                raise
            if not await connection.fetchval(statement("stop_all_workers")):
                raise SchemaError(
                    "no schema of the search_path has a table pg_task, but others have; name one in the DSN: "
                    "?options=-csearch_path%3DNAME"
                ) from None
            payload = ""
        listening = int(await connection.fetchval(statement("count_listening")))
    return payload.partition(" ")[2] or None, listening
