"""Changes of tasks: of some that are named, or of all that a filter chooses, in portions.

Invariants: a task under a live lease is changed by a cancel with `force` only. A run is cancelled as one, with its
children. Each portion is one transaction, which waits for no row that another session has locked.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from typing import Any, ClassVar
from uuid import UUID

import msgspec

from pgtask._postgres.listing import Cursor, TaskFilter, find_tasks
from pgtask._postgres.runs import cancel_runs
from pgtask._postgres.store import statement
from pgtask._postgres.tasks import (
    TaskChange,
    aware,
    cancel_tasks,
    change_tasks,
    in_transaction,
    plain_values,
    retry_on_deadlock,
    transaction,
)

__all__ = [
    "begin_bulk",
    "PORTION",
    "Cancel",
    "Change",
    "Move",
    "Reschedule",
    "Retry",
    "apply_change",
    "change_portion",
    "count_portion",
]

PORTION = 2_000
"""The most tasks that one transaction changes."""


class Change(msgspec.Struct, frozen=True):
    """A change. Its statement is `sql/<name>.sql` for tasks that are named, `sql/bulk/<name>.sql` for a filter."""

    name: ClassVar[str]

    @property
    def args(self) -> tuple[Any, ...]:
        """The parameters of its statements, after those that choose the tasks."""
        return ()

    @property
    def words(self) -> list[str]:
        """What it does beside its name, as words of its command."""
        return []

    @property
    def action(self) -> str:
        """What it does, for the row of an action."""
        return shlex.join([self.name, *self.words])


class Cancel(Change, frozen=True):
    """Remove the task; under a live lease only by `force`."""

    name: ClassVar[str] = "cancel"
    force: bool = False

    @property
    def words(self) -> list[str]:
        return ["--force"] if self.force else []


class Retry(Change, frozen=True):
    """Make the task due now, without an error and with all its retries."""

    name: ClassVar[str] = "retry"


class Reschedule(Change, frozen=True):
    """Make the task due at a time, or after a delay in seconds."""

    name: ClassVar[str] = "reschedule"
    at: datetime | None = None
    delay: float | None = None

    @property
    def args(self) -> tuple[Any, ...]:
        assert self.at is not None  # of fix_time
        return (self.at,)

    @property
    def words(self) -> list[str]:
        return ["--after", f"{self.delay:.12g}s"] if self.at is None else ["--at", self.at.isoformat()]


class Move(Change, frozen=True):
    """Move the task to another queue or priority; None: as it is."""

    name: ClassVar[str] = "move"
    queue: str | None = None
    priority: int | None = None

    @property
    def args(self) -> tuple[Any, ...]:
        return (self.queue, self.priority)

    @property
    def words(self) -> list[str]:
        given = (("--queue", self.queue), ("--priority", self.priority))
        return [word for name, value in given if value is not None for word in (name, str(value))]


async def begin_bulk(connection: Any, wanted: TaskFilter, change: Change) -> tuple[TaskFilter, Change]:
    """Return the filter and the change for all portions: it leaves out tasks that are created from now on, and has a
    time in place of a delay."""
    now = aware(await connection.fetchval(statement("server_time"), 0.0))
    return msgspec.structs.replace(wanted, created_before=now), await _fix_time(connection, change)


async def _fix_time(connection: Any, change: Change) -> Change:
    """Return the change with a time in place of a delay."""
    if not isinstance(change, Reschedule) or change.at is not None:
        return change
    return Reschedule(at=aware(await connection.fetchval(statement("server_time"), change.delay)))


async def apply_change(connection: Any, ids: Sequence[UUID], change: Change) -> list[TaskChange]:
    """Change the tasks, in the order of `ids`; in the caller's transaction, if the connection is in one."""
    if isinstance(change, Cancel):
        return await _cancel(connection, ids, force=change.force)
    fixed = await _fix_time(connection, change)
    return await change_tasks(connection, ids, fixed.name, ids, *fixed.args)


async def _cancel(connection: Any, ids: Sequence[UUID], *, force: bool) -> list[TaskChange]:
    """Cancel tasks and runs. The runs keep their records, and their children are cancelled with them."""
    async with in_transaction(connection):
        runs = [plain_values(row) for row in await connection.fetch(statement("find_runs"), ids)]
    if not runs:
        return await cancel_tasks(connection, ids, force=force)
    gone = set(await cancel_runs(connection, [run["id"] for run in runs], force=force))
    changes = {run["id"]: TaskChange(is_done=run["id"] in gone, was_there=True, **run) for run in runs}
    plain = [task for task in ids if task not in changes]
    changes |= {one.id: one for one in (await cancel_tasks(connection, plain, force=force) if plain else ())}
    return [changes[task] for task in dict.fromkeys(ids)]


async def change_portion(
    connection: Any, wanted: TaskFilter, change: Change, *, limit: int, after: Cursor | None
) -> tuple[int, Cursor | None]:
    """Change up to `limit` tasks that the filter chooses. Returns how many were changed, and the place of the next
    portion, None at the end. Both are those of `begin_bulk`.

    A task is changed once: each bulk statement passes over those that are already as it makes them."""
    ids, following = await find_tasks(connection, wanted, limit=limit, after=after)
    if not ids:
        return 0, following
    return await retry_on_deadlock(connection, partial(_change_chosen, connection, ids, wanted, change)), following


async def count_portion(
    connection: Any, wanted: TaskFilter, change: Change, *, limit: int, after: Cursor | None
) -> tuple[int, Cursor | None]:
    """Return how many of up to `limit` tasks that the filter chooses would be changed now, and the place of the next
    portion."""
    ids, following = await find_tasks(connection, wanted, limit=limit, after=after)
    if not ids:
        return 0, following
    args = (change.force,) if isinstance(change, Cancel) else change.args
    async with transaction(connection, readonly=True):
        return await connection.fetchval(statement(f"bulk/count_{change.name}"), ids, *wanted.args, *args), following


async def _change_chosen(connection: Any, ids: Sequence[UUID], wanted: TaskFilter, change: Change) -> int:
    """Change those of the tasks that the filter still chooses, in one transaction."""
    async with transaction(connection):
        if not isinstance(change, Cancel):
            await connection.fetchval(statement("bulk/together"))
            done = await connection.fetchval(statement(f"bulk/{change.name}"), ids, *wanted.args, *change.args)
            return int(done)
        rows = await connection.fetch(statement("bulk/lock"), ids, *wanted.args, change.force)
        runs = [UUID(int=row["id"].int) for row in rows if row["is_run"]]
        plain = [row["id"] for row in rows if not row["is_run"]]
        gone = set(await cancel_runs(connection, runs)) if runs else set()
        if plain:
            await connection.fetch(statement("cancel"), plain, True)
        return len(plain) + len(gone.intersection(runs))
