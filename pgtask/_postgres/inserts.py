"""Inserts of tasks and runs: with a key or without, one or many.

Invariants: an id that is returned is that of a row in the table. Where no row comes back, we look for the cause a
bounded number of times. If no task has the key, the cause is a trigger, rule or policy of the user's on the table.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import asyncpg

from pgtask._ids import TaskId, first_id
from pgtask._placement import KEEP
from pgtask._postgres.store import statement
from pgtask._postgres.transactions import atomically, planned_by_index
from pgtask._validate import NewRow
from pgtask.errors import DataRefused

__all__ = [
    "KEPT_OUT",
    "MAX_KEY_TRIES",
    "check_copied",
    "insert_keyed",
    "insert_keyless",
    "insert_run",
    "insert_runs",
    "insert_task",
    "refusals",
    "task_insert",
]

CHUNK_TASKS = 1000  # tasks in a statement,
CHUNK_ONTO = 200  # and in one that may change others
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


def _columns(row: NewRow) -> tuple[Any, ...]:
    """Return the parameters of enqueue.sql but for the id and the key."""
    place = row.place
    return row.step, place.at, place.delay, place.queue, place.priority, place.expires_at, place.expires_in


def task_insert(id: UUID, row: NewRow) -> tuple[str, list[Any]]:
    """Return the statement that inserts a task, or does to one that has its key what its rule says, and its values."""
    key = row.place.key
    if row.place.rule != KEEP:
        return statement("enqueue_onto"), [*_arrays([id], [row]), *row.place.rule]
    if key is None:
        return statement("enqueue_keyless"), [id, *_columns(row)]
    return statement("enqueue"), [id, *_columns(row), key]


async def insert_task(connection: Any, row: NewRow) -> TaskId:
    """Insert a task and return its id, or that of the task that has its key."""
    key = row.place.key
    if key is not None and row.place.rule != KEEP:
        with refusals():
            return (await insert_onto(connection, {key: row}))[key]

    async def insert(id: UUID) -> Any:
        text, args = task_insert(id, row)
        return await connection.fetchval(text, *args)

    async def find() -> Any:
        return (await connection.fetchrow(statement("find_keys"), [key]) or (None, None))[1]

    return await _insert_or_find(connection, insert, key, find)


async def insert_run(connection: Any, name: str, columns: Sequence[Any], key: str | None) -> TaskId:
    """Insert a run of the workflow `name` (text, time, delay, queue, priority), like `insert_task`."""

    async def insert(id: UUID) -> Any:
        if key is None:
            return await connection.fetchval(statement("runs/trigger_keyless"), id, name, *columns)
        return await connection.fetchval(statement("runs/trigger"), id, name, *columns, key)

    async def find() -> Any:
        return (await connection.fetchrow(statement("find_keys"), [key]) or (None, None))[1]

    return await _insert_or_find(connection, insert, key, find)


async def _insert_or_find(
    connection: Any, insert: Callable[[UUID], Awaitable[Any]], key: str | None, find: Callable[[], Awaitable[Any]]
) -> TaskId:
    """Insert a row, or find the one that has the key."""
    with refusals():
        for _ in range(MAX_KEY_TRIES):
            found = await insert(UUID(int=first_id()))
            is_new = found is not None
            if found is None and key is not None:
                async with planned_by_index(connection):
                    found = await find()
            if found is not None:
                return TaskId(found.int, "new" if is_new else "kept")
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


async def insert_keyed(connection: Any, rows: Mapping[str, NewRow]) -> dict[str, TaskId]:
    """Insert tasks by their keys, some in a statement, all or none. Returns the ids that have the keys then.

    Goes in the order of the keys, whatever the order of the batch: two batches that share keys wait for each other.
    """
    found: dict[str, TaskId] = {}
    keys = sorted(rows)
    with refusals():
        async with atomically(connection):
            at = 0
            while at < len(keys):
                is_plain = rows[keys[at]].place.rule == KEEP
                chunk = {key: rows[key] for key in keys[at : at + (CHUNK_TASKS if is_plain else CHUNK_ONTO)]}
                found |= await (_insert_chunk(connection, chunk) if is_plain else insert_onto(connection, chunk))
                at += len(chunk)
    return found


async def insert_keyless(connection: Any, rows: Sequence[NewRow]) -> list[TaskId]:
    """Insert tasks without keys in one statement, and return their ids."""
    ids = _make_ids(len(rows))
    with refusals():
        inserted = await connection.fetch(statement("enqueue_keyed"), *_arrays(ids, rows))
    _check_count(len(inserted), len(rows))
    return [TaskId(id.int, "new") for id in ids]


async def _insert_chunk(connection: Any, chunk: Mapping[str, NewRow]) -> dict[str, TaskId]:
    """Insert a chunk, or find the tasks that have its keys."""
    found: dict[str, TaskId] = {}
    missing = list(chunk)
    for _ in range(MAX_KEY_TRIES):
        rows = [chunk[key] for key in missing]
        some = await connection.fetch(statement("enqueue_keyed"), *_arrays(_make_ids(len(rows)), rows))
        found.update((row[0], TaskId(row[1].int, "new")) for row in some)
        missing = [key for key in missing if key not in found]
        if missing:
            async with planned_by_index(connection):
                some = await connection.fetch(statement("find_keys"), missing)
            found.update((row[0], TaskId(row[1].int, "kept")) for row in some)
            missing = [key for key in missing if key not in found]
        if not missing:
            return found
    raise _kept_out(missing[0])


async def insert_onto(connection: Any, chunk: Mapping[str, NewRow]) -> dict[str, TaskId]:
    """Insert a chunk of tasks with one rule, which may change the tasks that have its keys."""
    rows = list(chunk.values())
    rule = rows[0].place.rule
    arrays = _arrays(_make_ids(len(rows)), rows)
    some = await connection.fetch(statement("enqueue_onto"), *arrays, *rule)
    found = {row[1]: TaskId(row[0].int, row[2]) for row in some}
    if len(found) < len(chunk):
        raise _kept_out(next(key for key in chunk if key not in found))
    return found


def _kept_out(key: str) -> DataRefused:
    return DataRefused(f"the task with the key {key!r} was not inserted, and there is none: {KEPT_OUT}")


def _make_ids(count: int) -> list[UUID]:
    first = first_id()
    return [UUID(int=first + at) for at in range(count)]


def _arrays(ids: list[UUID], rows: Sequence[NewRow]) -> tuple[list[Any] | None, ...]:
    """Return the columns of enqueue_keyed.sql and enqueue_onto.sql; None for an empty one."""
    columns = zip(*((*_columns(row)[:5], row.place.key, *_columns(row)[5:]) for row in rows), strict=True)
    return ids, *(list(column) if any(value is not None for value in column) else None for column in columns)


def check_copied(status: str, wanted: int) -> None:
    """Raise `DataRefused` unless a COPY, which ended with this status, has inserted all rows."""
    _check_count(int(status.rpartition(" ")[2]), wanted)


def _check_count(inserted: int, wanted: int) -> None:
    if inserted != wanted:
        raise DataRefused(f"{wanted - inserted} of {wanted} tasks were not inserted: {KEPT_OUT}")
