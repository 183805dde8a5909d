"""The schedules of an app in memory: they start their tasks when the clock in memory comes to their times.

Invariant: the code of the worker plans what they start; `start_due` changes the table like fire.sql.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from uuid import UUID

from pgtask._cron import next_time
from pgtask._due import DueSchedule, plan_firing
from pgtask._memory.client import MemoryClient
from pgtask._occurrences import occurrence_id
from pgtask.schedules import DeclaredSchedule, Schedule

__all__ = ["MemorySchedules"]


class _Row:
    """A schedule with its next time."""

    def __init__(self, declared: DeclaredSchedule, now: datetime) -> None:
        self.declared = declared
        self.next_at = next_time(declared.cron, declared.zone, now)
        self.last_task: UUID | None = None
        self.waits = False
        """Whether its next occurrence waits for the end of its last task."""


class MemorySchedules:
    """The schedules, which begin at the present time of the client's clock."""

    def __init__(self, client: MemoryClient, schedules: Iterable[Schedule]) -> None:
        self._client = client
        self._rows = [_Row(schedule._declared(), client.rows.now) for schedule in schedules]

    def next_due(self) -> datetime | None:
        """Return the time of the next look; None if there is none before a task ends."""
        return min((row.next_at for row in self._rows if not (row.waits and self._is_running(row))), default=None)

    def start_due(self) -> None:
        """Start the tasks of the occurrences whose time has come."""
        now = self._client.rows.now
        for row in self._rows:
            if row.next_at <= now:
                self._start(row, now)

    def _is_running(self, row: _Row) -> bool:
        task = None if row.last_task is None else self._client.rows.tasks.get(row.last_task)
        return task is not None and task.state in ("waiting", "leased")

    def _start(self, row: _Row, now: datetime) -> None:
        one = row.declared
        rules = (one.name, one.cron, one.zone, one.missed, one.max_missed, one.overlap)
        firing = plan_firing(DueSchedule(*rules, row.next_at, False, self._is_running(row)), now)
        for time in firing.times:
            row.last_task = occurrence_id(one.name, time)
            self._client._memory.start_occurrence(row.last_task, one)
        row.next_at, row.waits = firing.next_at, firing.look_at > firing.next_at
