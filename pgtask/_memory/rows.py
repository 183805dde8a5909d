"""The table in memory: what `pg_task` would hold, and a clock that goes where it is told.

Invariant: `insert`, `claim` and `write` do to these tasks what enqueue.sql, claim.sql and flush.sql do to the rows.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, Literal
from uuid import UUID

import msgspec

from pgtask._fastpath import Outcomes
from pgtask.task import Task

__all__ = ["FOREVER", "MemoryTask", "Rows", "Try"]

FOREVER = datetime.max.replace(tzinfo=UTC)
"""When a task falls due that waits until somebody wakes it."""


class Try(msgspec.Struct, eq=False):
    """One try of a step: which, the how-manieth, when by the clock in memory, and the error it ended with."""

    step: Task
    attempt: int
    at: datetime
    error: str | None = None


class MemoryTask(msgspec.Struct, kw_only=True, eq=False):
    """A task in memory: the columns of its row, with the step as JSON in `raw`, and what has run.

    The task of a run of a workflow is `cancelled` with it, and `done` when it has ended well.
    """

    id: UUID
    state: Literal["waiting", "leased", "parked", "done", "cancelled"] = "waiting"
    raw: str
    queue: str
    priority: int
    key: str | None
    due_at: datetime
    created_at: datetime
    tried: int = 0
    claims: int = 0
    error: str | None = None
    tries: list[Try] = []

    @property
    def is_live(self) -> bool:
        """Whether it has a row."""
        return self.state in ("waiting", "leased", "parked")

    @property
    def steps(self) -> list[Task]:
        """The steps that ran, each as often as it was tried."""
        return [one.step for one in self.tries]


class Rows:
    """The tasks of one table, finished ones included, and its clock."""

    def __init__(self, now: datetime | None = None) -> None:
        self.now = datetime.now(UTC) if now is None else now
        self.tasks: dict[UUID, MemoryTask] = {}

    def insert(self, task: MemoryTask) -> MemoryTask:
        """Add a task; if there is a live one with its key, that one is returned and nothing is added."""
        holder = self.holder(task.key)
        if holder is None:
            self.tasks[task.id] = task
        return holder or task

    def holder(self, key: str | None) -> MemoryTask | None:
        """The live task that has a key."""
        having = (task for task in self.tasks.values() if task.key == key and task.is_live)
        return None if key is None else next(having, None)

    def next_due(self) -> datetime | None:
        """When the first waiting task falls due, or fell; None if all wait for somebody to wake them."""
        waiting = (task.due_at for task in self.tasks.values() if task.state == "waiting")
        return min((due for due in waiting if due < FOREVER), default=None)

    def wake(self, task: MemoryTask) -> None:
        """Something has come for it: it is due now, or, if it is leased, its due time says so."""
        if task.state == "waiting":
            task.due_at = min(task.due_at, self.now)
        elif task.state == "leased":
            task.due_at = max(self.now, task.due_at + timedelta(microseconds=1))

    def claim(self, limit: int) -> list[tuple[Any, ...]]:
        """Due tasks in the order of a worker, as the rows that claim.sql returns."""
        due = [task for task in self.tasks.values() if task.state == "waiting" and task.due_at <= self.now]
        due.sort(key=lambda task: (-task.priority, task.due_at))
        for task in due[:limit]:
            task.state = "leased"
            task.claims += 1
        return [(task.id, task.raw, task.tried, task.claims, None, task.due_at.timestamp()) for task in due[:limit]]

    def release(self, ids: list[UUID]) -> None:
        """What was claimed and has no outcome is waiting again; `claims` goes on counting."""
        for id in ids:
            if self.tasks[id].state == "leased":
                self.tasks[id].state = "waiting"

    def write(self, outcomes: Outcomes) -> None:
        """What is no longer leased was cancelled meanwhile, and stays so."""
        for id in outcomes.done_ids + outcomes.archived_ids:
            self.tasks[id].state = "done"
        for id, step in zip(outcomes.kept_ids, outcomes.kept_steps, strict=True):
            task = self.tasks[id]
            task.raw, task.tried, task.claims = step, 0, 1
        moved = zip(
            *(outcomes.moved_ids, outcomes.moved_steps, outcomes.moved_tried, outcomes.moved_errors),
            *(outcomes.moved_delays, outcomes.moved_queues, outcomes.moved_priorities, outcomes.moved_claims),
            strict=True,
        )
        for id, raw, tried, error, delay, queue, priority, claims in moved:
            task = self.tasks[id]
            if task.state != "leased":
                continue
            task.state = "waiting" if error is None else "parked"
            task.raw = task.raw if raw is None else raw
            task.tried = task.tried if tried is None else tried
            task.error = error
            task.due_at = self.now + timedelta(seconds=delay)
            task.queue = task.queue if queue is None else queue
            task.priority = task.priority if priority is None else priority
            task.claims = claims or 0
