"""Inserts of tasks and runs: with a key or without, one or many.

Invariants: an id that is returned is that of a row in the table. Where no row comes back, we look for the cause a
bounded number of times. If no task has the key, the cause is a trigger, rule or policy of the user's on the table.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn
from uuid import UUID

import asyncpg

from pgtask._ids import first_id
from pgtask._postgres.store import statement
from pgtask._postgres.transactions import atomically, planned_by_index
from pgtask.errors import DataRefused, EnqueueError

__all__ = [
    "KEPT_OUT",
    "MAX_KEY_TRIES",
    "check_copied",
    "insert_keyed",
    "insert_run",
    "insert_runs",
    "insert_task",
    "raise_taken",
    "refusals",
]

MAX_KEY_TRIES = 20  # times that the task with a key may finish between our insert and the look for it

KEPT_OUT = "a trigger, rule or row security policy of yours on pg_task keeps it out"


@contextmanager
def refusals() -> Iterator[None]:
    """Turn refusals by the user's own rules and row security into `DataRefused`: these are about the row."""
    try:
        yield
    except asyncpg.InvalidCachedStatementError:
        raise
    except asyncpg.FeatureNotSupportedError as error:
        raise DataRefused(f"a rule or row security of yours on pg_task does not allow it: {error.args[0]}") from error
    except (asyncpg.InsufficientPrivilegeError, asyncpg.WithCheckOptionViolationError) as error:
        if error.server_source_function != "ExecWithCheckOptions":
            raise
        raise DataRefused(f"{error.args[0]} (SQLSTATE {error.sqlstate})") from error


async def insert_task(connection: Any, columns: Sequence[Any], key: str | None) -> UUID:
    """Insert a task (step, time, delay, queue, priority) and return its id, or that of the task that has the key."""

    async def insert(id: UUID) -> Any:
        if key is None:
            return await connection.fetchval(statement("enqueue_keyless"), id, *columns)
        return await connection.fetchval(statement("enqueue"), id, *columns, key)

    async def find() -> Any:
        return (await connection.fetchrow(statement("find_keys"), [key]) or (None, None))[1]

    return await _insert_or_find(connection, insert, key, find)


async def insert_run(connection: Any, name: str, columns: Sequence[Any], key: str | None) -> UUID:
    """Insert a run of the workflow `name`, like `insert_task`. Raises `EnqueueError` for a key of another kind."""

    async def insert(id: UUID) -> Any:
        if key is None:
            return await connection.fetchval(statement("runs/trigger_keyless"), id, name, *columns)
        return await connection.fetchval(statement("runs/trigger"), id, name, *columns, key)

    async def find() -> Any:
        row = await connection.fetchrow(statement("runs/find_key"), key)
        if row is not None and row["workflow"] != name:
            raise_taken(key, name, row["id"], row["workflow"])
        return row and row["id"]

    return await _insert_or_find(connection, insert, key, find)


def raise_taken(key: str | None, name: str, task: UUID, workflow: str | None) -> NoReturn:
    """Raise `EnqueueError`: the key of a run belongs to a plain task, or to a run of another workflow."""
    what = f"task {task}" if workflow is None else f"run {task} of workflow {workflow}"
    raise EnqueueError(
        f"the key {key!r} is that of {what}, so no run of workflow {name} was triggered: "
        "all tasks and workflows of a table share their keys; begin each key with what it is of"
    )


async def _insert_or_find(
    connection: Any, insert: Callable[[UUID], Awaitable[Any]], key: str | None, find: Callable[[], Awaitable[Any]]
) -> UUID:
    """Insert a row, or find the one that has the key."""
    with refusals():
        for _ in range(MAX_KEY_TRIES):
            found = await insert(UUID(int=first_id()))
            if found is None and key is not None:
                async with planned_by_index(connection):
                    found = await find()
            if found is not None:
                return UUID(int=found.int)
            if key is None:
                raise DataRefused(f"the task was not inserted: {KEPT_OUT}")
            # The task with this key was finished in between: there is room for ours now.
    raise DataRefused(f"the task with the key {key!r} was not inserted, and there is none: {KEPT_OUT}")


async def insert_runs(
    connection: Any, ids: Sequence[UUID], name: str, texts: Sequence[str], lane: tuple[str, int], chunk: int
) -> None:
    """Insert runs of one workflow, `chunk` in a statement, all or none."""
    with refusals():
        async with atomically(connection):
            for at in range(0, len(texts), chunk):
                part = slice(at, at + chunk)
                some = (ids[part], name, texts[part], *lane)
                _check_count(await connection.fetchval(statement("runs/trigger_many"), *some), len(some[0]))


async def insert_keyed(connection: Any, rows: Mapping[str, tuple[str, str, int]], chunk: int) -> dict[str, UUID]:
    """Insert tasks (step, queue, priority) by their keys, `chunk` in a statement, all or none. Returns the ids
    that have the keys then.

    Goes in the order of the keys, whatever the order of the batch: two batches that share keys wait for each other.
    """
    found: dict[str, UUID] = {}
    keys = sorted(rows)
    with refusals():
        async with atomically(connection):
            for at in range(0, len(keys), chunk):
                found |= await _insert_chunk(connection, {key: rows[key] for key in keys[at : at + chunk]})
    return found


async def _insert_chunk(connection: Any, chunk: dict[str, tuple[str, str, int]]) -> dict[str, UUID]:
    """Insert a chunk, or find the tasks that have its keys."""
    found: dict[str, UUID] = {}
    missing = list(chunk)
    for _ in range(MAX_KEY_TRIES):
        first = first_id()
        ids = [UUID(int=first + at) for at in range(len(missing))]
        columns = [list(column) for column in zip(*(chunk[key] for key in missing), strict=True)]
        some = await connection.fetch(statement("enqueue_keyed"), ids, *columns, missing)
        async with planned_by_index(connection):
            some += await connection.fetch(statement("find_keys"), missing)
        found.update((row[0], UUID(int=row[1].int)) for row in some)
        missing = [key for key in missing if key not in found]
        if not missing:
            return found
    raise DataRefused(f"the task with the key {missing[0]!r} was not inserted, and there is none: {KEPT_OUT}")


def check_copied(status: str, wanted: int) -> None:
    """Raise `DataRefused` unless a COPY, which ended with this status, has inserted all rows."""
    _check_count(int(status.rpartition(" ")[2]), wanted)


def _check_count(inserted: int, wanted: int) -> None:
    if inserted != wanted:
        raise DataRefused(f"{wanted - inserted} of {wanted} tasks were not inserted: {KEPT_OUT}")
