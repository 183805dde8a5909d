"""Inserts of many tasks: with keys, in the order of these; or with times of their own.

Invariants: an id that is returned is that of a row in the table. Two calls that share keys wait for each other, in
whatever order their tasks are.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from typing import Any
from uuid import UUID

import asyncpg

from pgtask._fastpath import CopyRows
from pgtask._ids import TaskId, first_id
from pgtask._placement import KEEP, Placement
from pgtask._postgres.refusals import KEPT_OUT, MAX_KEY_TRIES, check_count, refusals
from pgtask._postgres.store import statement
from pgtask._postgres.transactions import atomically, planned_by_index
from pgtask._traces import trace_to_write
from pgtask._validate import NewRow
from pgtask.errors import DataRefused

__all__ = [
    "CHUNK_TASKS",
    "arrays_of",
    "copy_rows",
    "insert_keyed",
    "insert_keyless",
    "insert_onto",
    "is_plain",
    "traced",
]

CHUNK_TASKS = 1000  # tasks in a statement,
CHUNK_ONTO = 200  # and in one that may change others
MAX_COPIED = 64_000  # tasks of a COPY that fails if another task has one of their keys
CHUNK_BYTES = 128 * 1024  # of a COPY


def traced(name: str, args: Sequence[Any]) -> tuple[str, list[Any]]:
    """Return a statement that inserts tasks and its values: with the trace of the current span, if that is sampled."""
    trace = trace_to_write()
    return (statement(name), list(args)) if trace is None else (statement(f"{name}:traced"), [*args, trace])


def _grouped(name: str, args: Sequence[Any], group: int | None) -> tuple[str, list[Any]]:
    """Return what `traced` does; with a group the statement that inserts its members."""
    return traced(name, args) if group is None else (statement(f"{name}:grouped"), [*args, trace_to_write(), group])


def is_plain(place: Placement) -> bool:
    """Return whether a task needs no more than its lane, and perhaps a key that another task may have."""
    _, _, at, delay, _, rule, expires_at, expires_in = place
    return at is None and delay is None and expires_at is None and expires_in is None and rule == KEEP


async def copy_rows(connection: Any, rows: CopyRows, source: AsyncIterator[bytes]) -> None:
    """Copy rows, which `source` builds, into the table."""
    columns = ["id", "step", "queue", "priority"]
    columns += ["key"] * rows.has_keys + ["trace"] * rows.has_trace + ["group_id"] * rows.has_group
    status = await connection.copy_to_table("pg_task", source=source, columns=columns, format="binary")
    check_count(int(status.rpartition(" ")[2]), rows.count)


async def insert_keyless(connection: Any, rows: Sequence[NewRow], group: int | None = None) -> list[TaskId]:
    """Insert tasks without keys in one statement, as members of a group if there is one, and return their ids."""
    ids = _make_ids(len(rows))
    with refusals():
        text, args = _grouped("enqueue_keyed", arrays_of(ids, rows), group)
        inserted = await connection.fetch(text, *args)
    check_count(len(inserted), len(rows))
    return [TaskId(id.int, "new") for id in ids]


async def insert_keyed(connection: Any, rows: Mapping[str, NewRow], group: int | None = None) -> dict[str, TaskId]:
    """Insert tasks by their keys, some in a statement, all or none, as members of a group if there is one. Returns the
    ids that have the keys then.

    While all tasks are new, more and more of them are copied at once, at twice the speed of an INSERT. A COPY fails if
    another task has one of the keys: then it goes on with INSERTs.
    """
    found: dict[str, TaskId] = {}
    keys = sorted(rows)
    is_keeping = all(row.place.rule == KEEP for row in rows.values())
    insert, least = (partial(_insert_chunk, group=group), CHUNK_TASKS) if is_keeping else (insert_onto, CHUNK_ONTO)
    copy = partial(_copy_chunk, group=group)
    at, size, may_copy = 0, least, is_keeping
    with refusals():
        async with atomically(connection):
            while at < len(keys):
                chunk = {key: rows[key] for key in keys[at : at + size]}
                some = await (insert if size == least else copy)(connection, chunk)
                at += len(some)
                found |= some
                may_copy &= bool(some)  # each COPY that fails leaves an error in the log of the server
                is_new = may_copy and all(id.outcome == "new" for id in some.values())
                size = min(2 * size, MAX_COPIED) if is_new else least
    return found


async def _copy_chunk(connection: Any, chunk: Mapping[str, NewRow], group: int | None) -> dict[str, TaskId]:
    """Copy a chunk of tasks; none of them if another task has one of their keys, or the connection cannot copy."""
    if not getattr(connection, "can_copy", True) or not all(is_plain(row.place) for row in chunk.values()):
        return {}
    first = first_id()
    try:
        async with atomically(connection):
            rows = CopyRows(first, has_keys=True, trace=trace_to_write(), group=group)
            await copy_rows(connection, rows, _build(rows, chunk))
    except (asyncpg.UniqueViolationError, asyncpg.FeatureNotSupportedError):  # the second: row security
        return {}
    return {key: TaskId(first + number, "new") for number, key in enumerate(chunk)}


async def _build(rows: CopyRows, chunk: Mapping[str, NewRow]) -> AsyncIterator[bytes]:
    for key, (codec, payload, place) in chunk.items():
        if rows.add(codec, payload, place.queue, place.priority, key) >= CHUNK_BYTES:
            yield rows.take()
    yield rows.take() + CopyRows.TRAILER


async def _insert_chunk(connection: Any, chunk: Mapping[str, NewRow], group: int | None = None) -> dict[str, TaskId]:
    """Insert a chunk, or find the tasks that have its keys."""
    found: dict[str, TaskId] = {}
    missing = list(chunk)
    for _ in range(MAX_KEY_TRIES):
        rows = [chunk[key] for key in missing]
        text, args = _grouped("enqueue_keyed", arrays_of(_make_ids(len(rows)), rows), group)
        some = await connection.fetch(text, *args)
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
    """Insert tasks with one rule, which may change the tasks that have their keys."""
    rows = list(chunk.values())
    rule = rows[0].place.rule
    arrays = arrays_of(_make_ids(len(rows)), rows)
    some = await connection.fetch(statement("enqueue_onto"), *arrays, *rule, trace_to_write())
    found = {row[1]: TaskId(row[0].int, row[2]) for row in some}
    if len(found) < len(chunk):
        raise _kept_out(next(key for key in chunk if key not in found))
    return found


def _kept_out(key: str) -> DataRefused:
    return DataRefused(f"the task with the key {key!r} was not inserted, and there is none: {KEPT_OUT}")


def _columns(row: NewRow) -> tuple[Any, ...]:
    """Return the columns of a task as the arrays of enqueue_keyed.sql, but for the id."""
    _, _, place = row
    queue, priority, at, delay, key, _, expires_at, expires_in = place
    return row.step, at, delay, queue, priority, key, expires_at, expires_in


def _make_ids(count: int) -> list[UUID]:
    first = first_id()
    return [UUID(int=first + at) for at in range(count)]


def arrays_of(ids: list[UUID], rows: Sequence[NewRow]) -> tuple[list[Any] | None, ...]:
    """Return the columns of enqueue_keyed.sql and enqueue_onto.sql; None for an empty one."""
    columns = zip(*map(_columns, rows), strict=True)
    return ids, *(list(column) if any(value is not None for value in column) else None for column in columns)
