"""A client that enqueues into memory, and remembers.

Invariant: it refuses what a `Client` refuses, by the same code.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from types import TracebackType
from typing import Any
from uuid import UUID

import msgspec

from pgtask._bulk import Source
from pgtask._encode import check_key, encode, lane_of
from pgtask._fastpath import Codec
from pgtask._ids import TaskIds, first_id
from pgtask._memory.records import Records, Triggered
from pgtask._memory.rows import MemoryTask, Rows
from pgtask._postgres.runs import RunStatus
from pgtask._worker.entries import Ended
from pgtask.client import Client
from pgtask.config import DEFAULT_MAX_STEP_BYTES
from pgtask.errors import EnqueueError
from pgtask.task import Task
from pgtask.workflow import RunState, Workflow

__all__ = ["Enqueued", "MemoryClient"]

ANYTHING: Any = object()


class Enqueued(msgspec.Struct, frozen=True, kw_only=True):
    """A call that enqueued: the step as its row has it, and when it is due. `is_new` unless its key was taken."""

    task_id: UUID
    step: Task
    queue: str
    priority: int
    key: str | None
    due_at: datetime
    is_new: bool


class MemoryClient(Client):
    """A stand-in for `Client` in tests: no database, and lists of all that was enqueued and triggered.

        client = MemoryClient()
        await sign_up(client, "ada@example.com")
        client.assert_enqueued(SendWelcome("ada@example.com"), queue="mail")

    It may be used with or without `async with`. What is enqueued with `conn=` counts at once: there is no transaction
    that could roll back. It has no `dsn` and no `consumer`.
    """

    def __init__(self, *, max_step_bytes: int = DEFAULT_MAX_STEP_BYTES, now: datetime | None = None) -> None:
        super().__init__(max_step_bytes=max_step_bytes)
        self.enqueued: list[Enqueued] = []
        self.rows = Rows(now)
        """The tasks, by id in `rows.tasks`, and the time in memory, `rows.now`."""
        self.records = Records(self.rows)
        """The records of runs, by id in `records.runs`."""

    async def __aenter__(self) -> MemoryClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass

    @property
    def dsn(self) -> str:
        raise EnqueueError("a MemoryClient has no database; for one in a test, use the fixture pgtask_database")

    def assert_enqueued(
        self,
        wanted: Task | type[Task],
        *,
        times: int | None = None,
        queue: str | None = None,
        priority: int | None = None,
        key: str | None = None,
        delay: timedelta | None = None,
    ) -> Enqueued:
        """Assert that a step, or any step of a class, was enqueued: at least once, or just so many `times`. The rest is
        asserted if given; `delay` is counted from the time in memory, to the millisecond. Returns the last of them.

        Only calls of this client count, not steps that a task goes on to.
        """
        found = [
            one
            for one in self.enqueued
            if (isinstance(one.step, wanted) if isinstance(wanted, type) else one.step == wanted)
            and self._fits(one, queue, priority, key, delay)
        ]
        calls = [(repr(one.step), one) for one in self.enqueued]
        _check_times(f"{wanted!r} was not enqueued", len(found), times, calls)
        return found[-1]

    def assert_not_enqueued(self, unwanted: Task | type[Task]) -> None:
        """Assert that a step, or any step of a class, was not enqueued."""
        for one in self.enqueued:
            if isinstance(one.step, unwanted) if isinstance(unwanted, type) else one.step == unwanted:
                raise AssertionError(f"{one.step!r} was enqueued, in {one.queue!r}")

    @property
    def triggered(self) -> list[Triggered]:
        """All runs that were triggered, by this client or as children of other runs."""
        return self.records.triggered

    def assert_triggered(
        self,
        wanted: Workflow[Any, Any] | str,
        input: Any = ANYTHING,
        *,
        times: int | None = None,
        queue: str | None = None,
        priority: int | None = None,
        key: str | None = None,
        delay: timedelta | None = None,
    ) -> Triggered:
        """`assert_enqueued` for runs: a workflow, or the one of that name, was triggered or spawned, with this input if
        it is given. Returns the last of them."""
        found = [
            one
            for one in self.triggered
            if _is_run_of(one, wanted, input) and self._fits(one, queue, priority, key, delay)
        ]
        what = f"{_name_of(wanted)}{'' if input is ANYTHING else f' with {input!r}'} was not triggered"
        calls = [(f"{one.workflow} with {one.input!r}", one) for one in self.triggered]
        _check_times(what, len(found), times, calls)
        return found[-1]

    def assert_not_triggered(self, unwanted: Workflow[Any, Any] | str, input: Any = ANYTHING) -> None:
        """Assert that a workflow was not triggered or spawned, with this input if one is given."""
        for one in self.triggered:
            if _is_run_of(one, unwanted, input):
                raise AssertionError(f"{one.workflow} was triggered with {one.input!r}, in {one.queue!r}")

    def _fits(
        self,
        one: Enqueued | Triggered,
        queue: str | None,
        priority: int | None,
        key: str | None,
        delay: timedelta | None,
    ) -> bool:
        return (
            queue in (None, one.queue)
            and priority in (None, one.priority)
            and key in (None, one.key)
            and (delay is None or abs(one.due_at - self.rows.now - delay) < timedelta(milliseconds=1))
        )

    # --- in place of the statements

    async def _insert(
        self,
        step: Task,
        at: datetime | None,
        delay: float | None,
        queue: str | None,
        priority: int | None,
        key: str | None,
        conn: Any,
    ) -> UUID:
        codec, payload = encode(step, self._max_step_bytes)
        lane = lane_of(step, queue, priority)
        due = self.rows.now + timedelta(seconds=delay or 0) if at is None else at
        return self._add(UUID(int=first_id()), codec, payload, lane, None if key is None else check_key(key), due)

    def _add(
        self, id: UUID, codec: Codec, payload: bytes, lane: tuple[str, int], key: str | None, due: datetime
    ) -> UUID:
        raw = (codec.prefix + payload + b"}}").decode()
        task = MemoryTask(
            id=id, raw=raw, queue=lane[0], priority=lane[1], key=key, due_at=due, created_at=self.rows.now, tries=[]
        )
        found = self.rows.insert(task)
        self.enqueued.append(
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

    @asynccontextmanager
    async def _connection(self, conn: Any) -> AsyncIterator[Any]:
        yield _NoConnection()

    async def _copy(self, connection: Any, source: Source, queue: str | None, priority: int | None) -> TaskIds:
        first = first_id()
        found = [(*encode(step, self._max_step_bytes), lane_of(step, queue, priority)) async for step, _ in source]
        for number, (codec, payload, lane) in enumerate(found):
            self._add(UUID(int=first + number), codec, payload, lane, None, self.rows.now)
        return TaskIds(UUID(int=first), len(found))

    async def _insert_keyed(
        self, connection: Any, source: Source, queue: str | None, priority: int | None
    ) -> list[UUID]:
        found = [
            (*encode(step, self._max_step_bytes), lane_of(step, queue, priority), check_key(key))
            async for step, key in source
        ]
        return [self._add(UUID(int=first_id()), *one, self.rows.now) for one in found]

    async def _trigger(
        self,
        name: str,
        text: str,
        at: datetime | None,
        delay: float | None,
        queue: str,
        priority: int,
        key: str | None,
        conn: Any,
    ) -> UUID:
        due = self.rows.now + timedelta(seconds=delay or 0) if at is None else at
        return self._add_run(UUID(int=first_id()), name, text, queue, priority, key, due)

    async def _trigger_all(
        self, ids: TaskIds, name: str, texts: list[str], queue: str, priority: int, conn: Any
    ) -> None:
        for id, text in zip(ids, texts, strict=True):
            self._add_run(id, name, text, queue, priority, None, self.rows.now)

    def _add_run(
        self, id: UUID, name: str, text: str, queue: str, priority: int, key: str | None, due: datetime
    ) -> UUID:
        task = MemoryTask(
            id=id, raw=text, queue=queue, priority=priority, key=key, due_at=due, created_at=self.rows.now, tries=[]
        )
        return self.records.add(task, name)

    async def _status(self, run: UUID) -> RunStatus | None:
        return self.records.status(run) if run in self.records.runs else None

    async def _list(self, name: str | None, state: RunState | None, limit: int, before: UUID | None) -> list[RunStatus]:
        found = [self.records.status(run) for run in self.records.latest() if before is None or run < before]
        return [one for one in found if name in (None, one.name) and state in (None, one.state)][:limit]

    async def _send(self, run: UUID, name: str, payload: str, conn: Any) -> bool:
        return self.records.signal(run, name, payload)

    async def _cancel(self, run: UUID, conn: Any) -> bool:
        return self.records.cancel(run)

    async def _resume(self, run: UUID, conn: Any) -> bool:
        return self.records.resume(run)

    async def _ended(self, run: UUID) -> Ended:
        return await self.records.ended(run)


def _is_run_of(one: Triggered, wanted: Workflow[Any, Any] | str, input: Any) -> bool:
    if one.workflow != _name_of(wanted):
        return False
    if input is ANYTHING:
        return True
    payload = wanted.encode_input(input) if isinstance(wanted, Workflow) else msgspec.json.encode(input)
    return bool(one.input == msgspec.json.decode(payload))


def _name_of(workflow: Workflow[Any, Any] | str) -> str:
    return workflow.name if isinstance(workflow, Workflow) else workflow


def _check_times(what: str, found: int, times: int | None, calls: Sequence[tuple[str, Enqueued | Triggered]]) -> None:
    """Raise `AssertionError` unless it was found so many times; by default, at all."""
    if times is not None and times < 1:
        raise ValueError(f"times={times}: to assert that something was not done there is assert_not_...")
    if not found if times is None else found != times:
        count = "" if times is None else f" {times} times, but {found} times"
        listed = "".join(f"\n  {shown} in {one.queue!r}, due {one.due_at}" for shown, one in calls)
        raise AssertionError(f"{what} so{count}; what was:{listed or ' nothing'}")


class _NoConnection:
    """Has the transaction in which nothing can go wrong."""

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        yield
