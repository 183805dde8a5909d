"""The statements of schedules: what an app declares, and what people look at and change.

Invariant: a worker that starts changes rows only where they differ from what its app declares, so that two versions of
an app in a deploy change them no more often than they start workers. Each command leaves a row of who did it, in the
same transaction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Literal, NamedTuple, TypeAlias
from uuid import UUID

import msgspec

from pgtask._cron import next_time
from pgtask._occurrences import occurrence_id
from pgtask._postgres.actions import begin_action, note_action
from pgtask._postgres.store import statement
from pgtask.schedules import DeclaredSchedule, Schedule

__all__ = [
    "Declaration",
    "ScheduleRow",
    "declaration",
    "pause_schedules",
    "read_schedules",
    "resume_schedules",
    "run_schedule",
]

MAX_LATE = 5.0  # seconds until a time that has passed is worth a word

TaskOfSchedule: TypeAlias = Literal["waiting", "running", "parked", "ended"]


class ScheduleRow(msgspec.Struct, frozen=True):
    """A row of pg_task_schedules, as of `seen_at`; `task` is the state of the task of the last occurrence."""

    name: str
    app: str
    cron: str
    zone: str
    step: str
    workflow: str | None
    queue: str
    priority: int
    missed: str
    max_missed: int
    overlap: str
    next_at: datetime
    last_at: datetime | None
    last_task: UUID | None
    skipped_at: datetime | None
    error: str | None
    paused_at: datetime | None
    paused_by: str | None
    removed_at: datetime | None
    task: TaskOfSchedule | None
    seen_at: datetime

    @property
    def state(self) -> Literal["removed", "paused", "failed", "on"]:
        """One word for people."""
        if self.removed_at is not None:
            return "removed"
        if self.paused_at is not None:
            return "paused"
        return "on" if self.error is None else "failed"

    @property
    def lateness(self) -> float:
        """Seconds since its time has passed, as long as it should have started; 0 for one that waits for its task."""
        waits = self.missed == "all" and self.overlap == "skip" and self.task in ("waiting", "running")
        return 0.0 if waits or self.state != "on" else max(0.0, (self.seen_at - self.next_at).total_seconds())

    @property
    def shown_state(self) -> str:
        """The state; `late` if it should have started more than `MAX_LATE` seconds ago."""
        return "late" if self.lateness > MAX_LATE else self.state


class Declaration(NamedTuple):
    """What a worker has to change: the arguments of declare.sql, and the apps that had some of these names before."""

    arguments: tuple[Any, ...]
    taken: dict[str, str]


def declaration(app: str, schedules: Mapping[str, Schedule], rows: Sequence[Any], now: datetime) -> Declaration | None:
    """Compare what an app declares with the rows of declared.sql, at a time of the database. Return what to change;
    None if nothing. Raises `CronError`."""
    before = {row[0]: row for row in rows}
    changed: list[tuple[Any, ...]] = []
    taken = {}
    for name, schedule in schedules.items():
        wanted, row = schedule._declared(), before.get(name)
        if row is not None and row[11] != app:
            taken[name] = row[11]
        if row is None or DeclaredSchedule(*row[:10]) != wanted or row[10] or name in taken:
            last_at = now if row is None or row[12] is None else row[12]  # the clock may have gone back since
            first = next_time(wanted.cron, wanted.zone, max(now, last_at))
            changed.append((*msgspec.structs.astuple(wanted), first))
    removed = [name for name, row in before.items() if name not in schedules and not row[10] and row[11] == app]
    if not changed and not removed:
        return None
    columns = [list(column) for column in zip(*changed, strict=True)] if changed else [[] for _ in range(11)]
    return Declaration((app, *columns, removed), taken)


async def read_schedules(connection: Any) -> list[ScheduleRow]:
    """Return all schedules: those that are removed last, the others by their next time."""
    return [ScheduleRow(*row) for row in await connection.fetch(statement("schedules/list"))]


async def pause_schedules(connection: Any, names: Sequence[str], by: str) -> set[str]:
    """Pause schedules in the name of `by`. Return those that were not paused."""
    return await _change(connection, "pause", names, (by,), by)


async def resume_schedules(connection: Any, names: Sequence[str], by: str) -> set[str]:
    """Resume schedules that are paused or removed, in the name of `by`. Return them."""
    return await _change(connection, "resume", names, (), by)


async def run_schedule(connection: Any, name: str, by: str) -> UUID | None:
    """Start a schedule now, in the name of `by`. Return the id of its task, or None if there is no such schedule, or it
    was started in this second."""
    async with connection.transaction():
        now: datetime = await connection.fetchval("SELECT statement_timestamp()")
        time = now.replace(microsecond=0)
        id = await connection.fetchval(statement("schedules/run"), name, occurrence_id(name, time), time)
        if id is not None:
            await note_action(connection, await begin_action(connection, by, "run", f"schedule {name}"), 1, "done")
    return None if id is None else UUID(int=id.int)


async def _change(connection: Any, action: str, names: Sequence[str], more: tuple[Any, ...], by: str) -> set[str]:
    async with connection.transaction():
        rows = await connection.fetch(statement(f"schedules/{action}"), list(names), *more)
        changed = {row[0] for row in rows}
        if changed:
            text = ", ".join(f"schedule {name}" for name in sorted(changed))
            await note_action(connection, await begin_action(connection, by, action, text), 0, "done")
    return changed
