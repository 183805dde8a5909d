"""The tables of a client in memory: `Rows` and `Records` in place of the rows of `_postgres.client_store`.

Invariant: each method answers like the method of its name there; the conformance tests compare the two.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg
import msgspec

from pgtask._copy import Source
from pgtask._fastpath import Codec, NewTask
from pgtask._ids import TaskIds, first_id
from pgtask._memory.records import Records
from pgtask._memory.rows import MemoryTask, Rows
from pgtask._postgres.failures import ParkedTask
from pgtask._postgres.inserts import raise_taken
from pgtask._postgres.runs import RunStatus
from pgtask._postgres.transactions import check_caller
from pgtask._validate import check_key, envelope_of
from pgtask._workflow.values import RunResult
from pgtask.task import Task
from pgtask.workflow import RunState

__all__ = ["Enqueued", "MemoryStore"]

Encode = Callable[[Task], tuple[Codec, bytes, tuple[str, int]]]


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

    def check_connection(self, conn: Any = None) -> None:
        """Take any object for a connection; but a real one must be in a transaction here too."""
        if isinstance(conn, (asyncpg.Connection, asyncpg.Pool)):
            check_caller(conn)

    # --- tasks

    async def insert_task(
        self,
        codec: Codec,
        payload: bytes,
        at: datetime | None,
        delay: float | None,
        lane: tuple[str, int],
        key: str | None,
        conn: Any,
    ) -> UUID:
        self.check_connection(conn)
        return self._add_task(UUID(int=first_id()), codec, payload, lane, key, self._due_time(at, delay))

    async def copy_tasks(self, source: Source, encode: Encode, conn: Any) -> TaskIds:
        first = first_id()
        found = [encode(step) async for step, _ in source]
        for number, encoded in enumerate(found):
            self._add_task(UUID(int=first + number), *encoded, None, self._rows.now)
        return TaskIds(UUID(int=first), len(found))

    async def insert_keyed_tasks(self, source: Source, encode: Encode, conn: Any) -> list[UUID]:
        found = [(*encode(step), check_key(key)) async for step, key in source]
        return [self._add_task(UUID(int=first_id()), *one, self._rows.now) for one in found]

    def add_new_tasks(self, tasks: Sequence[NewTask]) -> None:
        """Add the tasks that an outcome enqueues, like shared/new_tasks.sql."""
        for new in tasks:
            payload = new.step.encode()[len(new.codec.prefix) : -len(b"}}")]
            due = self._due_time(new.at, new.delay)
            self._add_task(new.id, new.codec, payload, (new.queue, new.priority), new.key, due)

    def _due_time(self, at: datetime | None, delay: float | None) -> datetime:
        return self._rows.now + timedelta(seconds=delay or 0) if at is None else at

    def _add_task(
        self, id: UUID, codec: Codec, payload: bytes, lane: tuple[str, int], key: str | None, due: datetime
    ) -> UUID:
        task = self._new_task(id, envelope_of(codec, payload), lane, key, due)
        found = self._rows.insert(task)
        self._enqueued.append(
            Enqueued(
                task_id=found.id,
                step=codec.decode(payload),
                queue=task.queue,
                priority=task.priority,
                key=key,
                due_at=due,
                is_new=found is task,
            )
        )
        return found.id

    def _new_task(self, id: UUID, text: str, lane: tuple[str, int], key: str | None, due: datetime) -> MemoryTask:
        queue, priority = lane
        return MemoryTask(
            id=id, raw=text, queue=queue, priority=priority, key=key, due_at=due, created_at=self._rows.now, tries=[]
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
    ) -> UUID:
        self.check_connection(conn)
        due = self._due_time(at, delay)
        holder = self._rows.holder(key)
        if holder is not None and (workflow := self._records.workflow_of(holder)) != name:
            raise_taken(key, name, holder.id, workflow)
        return self._records.add(self._new_task(UUID(int=first_id()), text, lane, key, due), name)

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
