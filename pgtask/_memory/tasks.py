"""The tasks of a client in memory, in place of `_postgres.task_store`.

Invariant: each method answers like the method of its name there; the conformance tests compare the two.
"""

from __future__ import annotations

import re
from collections import defaultdict
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import msgspec

from pgtask._memory.records import Records
from pgtask._memory.rows import MemoryTask, Rows
from pgtask._postgres.listing import STATES, Cursor, TaskFilter
from pgtask._postgres.statistics import LaneCount, Statistics
from pgtask._postgres.task_changes import Cancel, Change, Move, Reschedule
from pgtask._postgres.task_status import TaskState, TaskStatus
from pgtask._postgres.tasks import TaskChange

__all__ = ["MemoryTasks"]


class MemoryTasks:
    """The tasks of `rows` that are live, and the records of those that are runs."""

    def __init__(self, rows: Rows, records: Records) -> None:
        self._rows = rows
        self._records = records

    async def read_task(self, task: UUID) -> TaskStatus | None:
        found = self._rows.tasks.get(task)
        return None if found is None or not found.is_live else self._status(found)

    async def change_task(self, task: UUID, change: Change, conn: Any) -> TaskChange:
        found = self._rows.tasks.get(task)
        was_there = found is not None and found.is_live
        change = self._fix_time(change)
        is_done = found is not None and was_there and self._is_free(found, change)
        if found is not None and is_done:
            self._apply(found, change)
        return TaskChange(id=task, is_done=is_done, was_there=was_there, leased_until=None, seen_at=self._rows.now)

    async def list_page(self, wanted: TaskFilter, after: Cursor | None) -> tuple[list[TaskStatus], Cursor | None]:
        return list(map(self._status, self._find(wanted))), None

    async def count_tasks(self, wanted: TaskFilter) -> int:
        return len(self._find(wanted))

    async def change_tasks(self, wanted: TaskFilter, change: Change) -> int:
        change = self._fix_time(change)
        done = [task for task in self._find(wanted) if self._is_free(task, change) and not self._is_so(task, change)]
        for task in done:
            if task.is_live:  # it may be the child of a run that has been cancelled
                self._apply(task, change)
        return len(done)

    async def read_statistics(self) -> Statistics:
        lanes: dict[tuple[str, int], dict[str, Any]] = defaultdict(lambda: defaultdict(int))
        for task in self._rows.tasks.values():
            if task.is_live:
                lane = lanes[task.queue, task.priority]
                state = self._state(task)
                lane[state] += 1
                if state in ("ready", "scheduled"):
                    first = "oldest_due" if state == "ready" else "next_due"
                    lane[first] = min(lane.get(first, task.due_at), task.due_at)
        counts = [LaneCount(queue=queue, priority=priority, **counts) for (queue, priority), counts in lanes.items()]
        return Statistics(
            lanes=tuple(sorted(counts, key=lambda count: (count.queue, -count.priority))),
            rows=None,
            dead_rows=0,
            table_bytes=0,
            index_bytes=0,
            vacuumed_at=None,
            oldest_transaction=None,
            seen_at=self._rows.now,
        )

    # --- reading

    def _find(self, wanted: TaskFilter) -> list[MemoryTask]:
        """Return the tasks that the filter chooses, in the order of the lists of pgtask."""
        found = [task for task in self._rows.tasks.values() if task.is_live and self._matches(task, wanted)]
        return sorted(found, key=self._place)

    def _place(self, task: MemoryTask) -> tuple[int, str, int, timedelta]:
        state = self._state(task)
        since = task.due_at - self._rows.now
        if state == "parked":
            return STATES.index(state), "", 0, -since
        return STATES.index(state), task.queue, -task.priority, since

    def _matches(self, task: MemoryTask, wanted: TaskFilter) -> bool:
        return (
            self._state(task) in wanted.states
            and (wanted.queues is None or task.queue in wanted.queues)
            and wanted.key in (None, task.key)
            and wanted.group in (None, self._rows.group_names.get(task.group or 0))
            and (wanted.pattern is None or re.match(wanted.pattern, task.raw[:1024]) is not None)
            and (wanted.error is None or _is_like(task.error or "", wanted.error))
            and all(_has(task.raw, path, text) for path, text in wanted.where)
            and (wanted.older_than is None or task.due_at < self._rows.now - wanted.older_than)
        )

    def _state(self, task: MemoryTask) -> TaskState:
        if task.state == "parked" or task.state == "leased":
            return task.state
        return "scheduled" if task.due_at > self._rows.now else "ready"

    def _status(self, task: MemoryTask) -> TaskStatus:
        return TaskStatus(
            id=task.id,
            state=self._state(task),
            step=task.raw,
            queue=task.queue,
            priority=task.priority,
            key=task.key,
            tried=task.tried,
            wakeup_at=task.due_at,
            created_at=task.created_at,
            error=task.error,
            progress=task.tries[-1].progress if task.state == "leased" and task.tries else None,
            behind_id=self._rows.first_of(task),
            seen_at=self._rows.now,
        )

    # --- changing

    def _fix_time(self, change: Change) -> Change:
        if isinstance(change, Reschedule) and change.at is None:
            return Reschedule(at=self._rows.now + timedelta(seconds=change.delay or 0))
        return change

    def _is_free(self, task: MemoryTask, change: Change) -> bool:
        if task.state == "leased":
            return isinstance(change, Cancel) and change.force
        if task.behind is not None:
            return isinstance(change, Cancel | Move)
        return not (isinstance(change, Reschedule) and self._records.pauses(task))

    def _is_so(self, task: MemoryTask, change: Change) -> bool:
        """Return whether the task is already as a change in bulk makes it."""
        match change:
            case Cancel():
                return False
            case Reschedule():
                return task.error is None and task.due_at == change.at
            case Move():
                return change.queue in (None, task.queue) and change.priority in (None, task.priority)
        return task.error is None and task.tried == 0 and task.due_at <= self._rows.now

    def _apply(self, task: MemoryTask, change: Change) -> None:
        match change:
            case Cancel():
                if not self._records.cancel(task.id):
                    task.state = "cancelled"
            case Reschedule(at=datetime() as at):
                if task.state == "parked":
                    self._revive(task)
                task.due_at = at
            case Move():
                task.queue = task.queue if change.queue is None else change.queue
                task.priority = task.priority if change.priority is None else change.priority
            case _:
                self._revive(task)
                task.due_at = min(task.due_at, self._rows.now)

    def _revive(self, task: MemoryTask) -> None:
        """Clear the error and the tries of a task, and the end of its run, as a trigger of ours does."""
        task.state, task.error, task.tried, task.claims = "waiting", None, 0, 0
        self._records.reopen(task.id)


def _has(step: str, path: str, text: str) -> bool:
    """Return whether a step has a field with this text, as pg_task_has does."""
    found = next(iter(next(iter(msgspec.json.decode(step).values())).values()))
    for part in path.split("."):
        try:
            found = found[int(part)] if isinstance(found, list) else found[part]
        except (LookupError, TypeError, ValueError):
            return False
    return text == (found if isinstance(found, str) else msgspec.json.encode(found).decode())


def _is_like(text: str, pattern: str) -> bool:
    """Return whether a text matches a pattern of LIKE: % is any text, _ any character, a backslash quotes the next."""
    parts = re.findall(r"\\(.)|(%)|(_)|(.)", pattern, re.DOTALL)
    regex = "".join(".*" if many else "." if one else re.escape(quoted or other) for quoted, many, one, other in parts)
    return re.fullmatch(regex, text, re.DOTALL) is not None
