"""The tables of a client in memory: `Rows` and `Records` in place of the rows of `_postgres.client_store`.

Invariant: each method answers like the method of its name there; the conformance tests compare the two.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg
import msgspec

from pgtask._copy import Source
from pgtask._fastpath import NewTask
from pgtask._ids import TaskId, TaskIds, first_id
from pgtask._memory.groups import MemoryGroups
from pgtask._memory.records import Records
from pgtask._memory.rows import MemoryTask, Rows
from pgtask._memory.tasks import MemoryTasks
from pgtask._placement import Placement, shown_key
from pgtask._postgres.failures import ParkedTask
from pgtask._postgres.runs import RunStatus
from pgtask._postgres.transactions import check_caller
from pgtask._validate import ItemEncoder, NewRow
from pgtask._workflow.values import RunResult
from pgtask.schedules import DeclaredSchedule
from pgtask.task import Task
from pgtask.workflow import RunState

__all__ = ["Enqueued", "MemoryStore"]


class Enqueued(msgspec.Struct, frozen=True, kw_only=True):
    """A call that enqueued: the step as in its row, and its due time. `is_new` unless another task had the key."""

    task_id: UUID
    step: Task
    queue: str
    priority: int
    key: str | None
    due_at: datetime
    is_new: bool


class MemoryStore:
    """The tables of one client; `enqueued` gets each call that enqueues."""

    def __init__(self, rows: Rows, records: Records, enqueued: list[Enqueued]) -> None:
        self._rows = rows
        self._records = records
        self._enqueued = enqueued
        self.tasks = MemoryTasks(rows, records)
        """The tasks that have a row."""
        self.groups = MemoryGroups(rows, self._add_task)
        """The groups."""

    def check_connection(self, conn: Any = None) -> None:
        """Take any object for a connection; but a real one must be in a transaction here too."""
        if isinstance(conn, (asyncpg.Connection, asyncpg.Pool)):
            check_caller(conn)

    # --- tasks

    async def insert_task(self, row: NewRow, conn: Any) -> TaskId:
        self.check_connection(conn)
        return self._add_task(UUID(int=first_id()), row)

    async def copy_tasks(self, source: Source, encode: ItemEncoder, conn: Any) -> Sequence[UUID]:
        self.check_connection(conn)
        first = first_id()
        rows = [encode(item) async for item, _ in source]
        ids = [self._add_task(UUID(int=first + number), row) for number, row in enumerate(rows)]
        is_range = all(id.int == first + number for number, id in enumerate(ids))
        return TaskIds(UUID(int=first), len(rows)) if is_range else ids

    async def insert_keyed_tasks(self, source: Source, encode: ItemEncoder, conn: Any) -> list[TaskId]:
        self.check_connection(conn)
        rows = [encode(item, key) async for item, key in source]
        return [self._add_task(UUID(int=first_id()), row) for row in rows]

    def add_new_tasks(self, tasks: Sequence[NewTask], group: int | None) -> None:
        """Add the tasks that an outcome of a member of a group, if there is one, enqueues, like
        shared/new_tasks.sql."""
        for new in tasks:
            payload = new.step.encode()[len(new.codec.prefix) : -len(b"}}")]
            place = Placement(new.queue, new.priority, new.at, new.delay, new.key)
            self._add_task(new.id, NewRow(new.codec, payload, place), group)

    def start_occurrence(self, id: UUID, schedule: DeclaredSchedule) -> None:
        """Start a task or a run of a schedule, like schedules/fire.sql."""
        if id not in self._rows.tasks:
            lane = (schedule.queue, schedule.priority)
            task = self._new_task(id, schedule.step, lane, None, self._rows.now)
            if schedule.workflow is None:
                self._rows.insert(task)
            else:
                self._records.add(task, schedule.workflow)

    def _due_time(self, at: datetime | None, delay: float | None) -> datetime:
        return self._rows.now + timedelta(seconds=delay or 0) if at is None else at

    def _add_task(self, id: UUID, row: NewRow, group: int | None = None) -> TaskId:
        place = row.place
        delay = place.rule.debounce if place.delay is None else place.delay
        due = self._due_time(place.at, delay)
        task = self._new_task(id, row.step, (place.queue, place.priority), place.key, due)
        task.group = group
        if place.expires_in is not None:
            task.expires_at = self._rows.now + timedelta(seconds=place.expires_in)
        else:
            task.expires_at = place.expires_at
        found, outcome = self._rows.insert(task, place.rule)
        self._enqueued.append(
            Enqueued(
                task_id=UUID(int=found.id.int),
                step=row.codec.decode(row.payload),
                queue=task.queue,
                priority=task.priority,
                key=task.key,
                due_at=due,
                is_new=found is task,
            )
        )
        return TaskId(found.id.int, outcome)

    def _new_task(self, id: UUID, text: str, lane: tuple[str, int], key: str | None, due: datetime) -> MemoryTask:
        queue, priority = lane
        created = self._rows.now
        shown = shown_key(text, key)
        return MemoryTask(
            id=id, raw=text, queue=queue, priority=priority, key=shown, due_at=due, created_at=created, tries=[]
        )

    def follow_failures(self) -> AsyncGenerator[ParkedTask, None]:
        parked: asyncio.Queue[ParkedTask] = asyncio.Queue()

        def note_parked(task: MemoryTask) -> None:
            parked.put_nowait(
                ParkedTask(
                    id=task.id,
                    step=task.raw,
                    error=task.error or "",
                    tried=task.tried,
                    queue=task.queue,
                    priority=task.priority,
                    key=task.key,
                    created_at=task.created_at,
                    parked_at=self._rows.now,
                )
            )

        self._rows.followers.append(note_parked)

        async def follow() -> AsyncGenerator[ParkedTask, None]:
            try:
                while True:
                    yield await parked.get()
            finally:
                self._rows.followers.remove(note_parked)

        return follow()

    # --- runs

    async def insert_run(
        self,
        name: str,
        text: str,
        at: datetime | None,
        delay: float | None,
        lane: tuple[str, int],
        key: str | None,
        conn: Any,
    ) -> TaskId:
        self.check_connection(conn)
        task = self._new_task(UUID(int=first_id()), text, lane, key, self._due_time(at, delay))
        found = self._records.add(task, name)
        return TaskId(found.int, "new" if found == task.id else "kept")

    async def insert_runs(
        self, ids: TaskIds, name: str, texts: Sequence[str], lane: tuple[str, int], conn: Any
    ) -> None:
        self.check_connection(conn)
        for id, text in zip(ids, texts, strict=True):
            self._records.add(self._new_task(id, text, lane, None, self._rows.now), name)

    async def read_status(self, run: UUID) -> RunStatus | None:
        return self._records.status(run) if run in self._records.runs else None

    async def list_statuses(
        self, name: str | None, state: RunState | None, limit: int, before: UUID | None
    ) -> list[RunStatus]:
        found = [self._records.status(run) for run in self._records.latest() if before is None or run < before]
        return [one for one in found if name in (None, one.name) and state in (None, one.state)][:limit]

    async def send_signal(self, run: UUID, name: str, payload: str, conn: Any) -> bool:
        self.check_connection(conn)
        return self._records.signal(run, name, payload)

    async def cancel_run(self, run: UUID, conn: Any) -> bool:
        self.check_connection(conn)
        return self._records.cancel(run)

    async def resume_run(self, run: UUID, conn: Any) -> bool:
        self.check_connection(conn)
        return self._records.resume(run)

    async def wait_for_end(self, run: UUID) -> RunResult:
        return await self._records.wait_for_end(run)
