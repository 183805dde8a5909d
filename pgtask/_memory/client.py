"""A client without a database, which remembers each call that enqueued or triggered.

Invariant: it refuses the values that a `Client` refuses, by the same code; its tables are `MemoryStore`.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, Self

import msgspec

from pgtask._memory.records import Records, Triggered
from pgtask._memory.rows import Rows
from pgtask._memory.store import Enqueued, MemoryStore
from pgtask.client import Client
from pgtask.config import DEFAULT_MAX_STEP_BYTES
from pgtask.errors import EnqueueError
from pgtask.task import Task
from pgtask.task_function import TaskFunction, step_of
from pgtask.workflow import Workflow

__all__ = ["MemoryClient"]

ANYTHING: Any = object()


class MemoryClient(Client):
    """A stand-in for `Client` in tests, without a database. It lists all steps that were enqueued and runs triggered.

        client = MemoryClient()
        await sign_up(client, "ada@example.com")
        client.assert_enqueued(SendWelcome("ada@example.com"), queue="mail")

    You may use it with or without `async with`. A call with `conn=`, which may be any object, counts at once: there is
    no transaction that could roll back. It has no `dsn` and no `consumer`.
    """

    def __init__(self, *, max_step_bytes: int = DEFAULT_MAX_STEP_BYTES, now: datetime | None = None) -> None:
        super().__init__(max_step_bytes=max_step_bytes)
        self.enqueued: list[Enqueued] = []
        self.rows = Rows(now)
        """The tasks, by id in `rows.tasks`, and the time in memory, `rows.now`."""
        self.records = Records(self.rows)
        """The records of runs, by id in `records.runs`."""
        self._store = self._memory = MemoryStore(self.rows, self.records, self.enqueued)

    async def open(self) -> Self:
        return self

    async def close(self) -> None:
        pass

    @property
    def dsn(self) -> str:
        raise EnqueueError("a MemoryClient has no database; for one in a test, use the fixture pgtask_database")

    def assert_enqueued(
        self,
        wanted: Task | type[Task] | TaskFunction[..., Any],
        *,
        times: int | None = None,
        queue: str | None = None,
        priority: int | None = None,
        key: str | None = None,
        delay: timedelta | None = None,
    ) -> Enqueued:
        """Assert that a step, or any step of a class, was enqueued: at least once, or this many `times`. The other
        arguments are asserted if given; `delay` counts from the time in memory, to the millisecond. Returns the last
        such call.

        The calls of this client and the outcomes of its tasks (`Done(enqueue=...)`) count, not steps that a task goes
        on to.
        """
        wanted = step_of(wanted)
        found = [
            one
            for one in self.enqueued
            if (isinstance(one.step, wanted) if isinstance(wanted, type) else one.step == wanted)
            and self._fits(one, queue, priority, key, delay)
        ]
        calls = [(repr(one.step), one) for one in self.enqueued]
        _check_times(f"{wanted!r} was not enqueued", len(found), times, calls)
        return found[-1]

    def assert_not_enqueued(self, unwanted: Task | type[Task] | TaskFunction[..., Any]) -> None:
        """Assert that a step, or any step of a class, was not enqueued."""
        unwanted = step_of(unwanted)
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
        """Assert, like `assert_enqueued`, that a workflow, or the one of that name, was triggered or spawned, with this
        input if you give one. Returns the last such call."""
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
        """Assert that a workflow was not triggered or spawned, with this input if you give one."""
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


def _is_run_of(one: Triggered, wanted: Workflow[Any, Any] | str, input: Any) -> bool:
    if one.workflow != _name_of(wanted):
        return False
    if input is ANYTHING:
        return True
    payload = wanted._encode_input(input) if isinstance(wanted, Workflow) else msgspec.json.encode(input)
    return bool(one.input == msgspec.json.decode(payload))


def _name_of(workflow: Workflow[Any, Any] | str) -> str:
    return workflow.name if isinstance(workflow, Workflow) else workflow


def _check_times(what: str, found: int, times: int | None, calls: Sequence[tuple[str, Enqueued | Triggered]]) -> None:
    """Raise `AssertionError` unless it was found this many times; by default, at least once."""
    if times is not None and times < 1:
        raise ValueError(f"times={times}: to assert that something was not done there is assert_not_...")
    if not found if times is None else found != times:
        count = "" if times is None else f" {times} times, but {found} times"
        listed = "".join(f"\n  {shown} in {one.queue!r}, due {one.due_at}" for shown, one in calls)
        raise AssertionError(f"{what} so{count}; what was:{listed or ' nothing'}")
