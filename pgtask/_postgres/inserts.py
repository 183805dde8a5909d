"""Inserts of a task or a run, with a key or without, and of runs of one workflow.

Invariant: an id that is returned is that of a row in the table.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from uuid import UUID

from pgtask._ids import TaskId, first_id
from pgtask._placement import KEEP
from pgtask._postgres.many_inserts import arrays_of, insert_onto, traced
from pgtask._postgres.refusals import KEPT_OUT, MAX_KEY_TRIES, check_count, refusals
from pgtask._postgres.store import statement
from pgtask._postgres.transactions import atomically, planned_by_index
from pgtask._traces import trace_to_write
from pgtask._validate import NewRow
from pgtask.errors import DataRefused

__all__ = ["insert_run", "insert_runs", "insert_task", "task_insert"]


def _columns(row: NewRow) -> tuple[Any, ...]:
    """Return the parameters of enqueue.sql but for the id and the key."""
    place = row.place
    return row.step, place.at, place.delay, place.queue, place.priority, place.expires_at, place.expires_in


def task_insert(id: UUID, row: NewRow) -> tuple[str, list[Any]]:
    """Return the statement that inserts a task, or does to one that has its key what its rule says, and its values."""
    key = row.place.key
    if row.place.rule != KEEP:
        return statement("enqueue_onto"), [*arrays_of([id], [row]), *row.place.rule, trace_to_write()]
    if key is None:
        return traced("enqueue_keyless", [id, *_columns(row)])
    return traced("enqueue", [id, *_columns(row), key])


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
            text, args = traced("runs/trigger_keyless", [id, name, *columns])
        else:
            text, args = traced("runs/trigger", [id, name, *columns, key])
        return await connection.fetchval(text, *args)

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
                text, some = traced("runs/trigger_many", [ids[part], name, texts[part], *lane])
                check_count(await connection.fetchval(text, *some), len(some[0]))
