"""The status of a task, as a client reads it.

Invariant: it is the row as it was at one moment, by the clock of the database.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal
from uuid import UUID

import msgspec

from pgtask._fastpath import scan_envelope
from pgtask._postgres.tasks import TaskRow
from pgtask._progress import Progress
from pgtask.errors import DecodeError

__all__ = ["TaskState", "TaskStatus", "status_of", "step_label"]

TaskState = Literal["ready", "scheduled", "leased", "parked"]


class TaskStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A task as it was at `seen_at`, by the clock of the database.

    - `state`: `ready` (due, it waits for a worker), `scheduled` (due at `wakeup_at`), `leased` (a worker runs it, or is
      about to) or `parked` (it waits for you, with its `error`).
    - `step`: the step as JSON, with its fields; `label` is its name, as `Greeter.ReadName`.
    - `tried`: failed tries of this step.
    - `wakeup_at`: the time at which it is due, or was parked. The years 9999 and 1 stand for the infinities.
    - `behind_id`: the task that has its key, behind which it waits, see `Client`; it is `scheduled` then, for the year
      9999. None if it waits behind none, or if that one has just gone.
    - `leased_until`: the end of its lease, unless its worker renews it; None if it has none, and in memory.
    - `progress`: what the running step has last reported.
    """

    id: UUID
    state: TaskState
    step: str
    queue: str
    priority: int
    key: str | None
    tried: int
    wakeup_at: datetime
    created_at: datetime
    error: str | None = None
    progress: Progress | None = None
    leased_until: datetime | None = None
    behind_id: UUID | None = None
    seen_at: datetime

    @property
    def label(self) -> str:
        """The task and the name of its step: `Greeter.ReadName`; `?` if the step cannot be read."""
        return step_label(self.step)


def status_of(row: TaskRow) -> TaskStatus:
    return TaskStatus(
        id=row.id,
        state=row.state,  # type: ignore[arg-type]  # describe.sql knows no other
        step=row.step,
        queue=row.queue,
        priority=row.priority,
        key=row.key,
        tried=row.tried,
        wakeup_at=row.wakeup_at,
        created_at=row.created_at,
        error=row.error,
        progress=row.progress,
        leased_until=row.lock_expires_at,
        behind_id=row.behind_id,
        seen_at=row.seen_at,
    )


def step_label(step: str) -> str:
    """Return `Greeter.ReadName`, also of a step that was cut; `?` if it is no envelope."""
    try:
        task, name, _ = scan_envelope(step)
    except DecodeError:
        return _label_of_beginning(step)
    return f"{task}.{name}"


def _label_of_beginning(step: str) -> str:
    parts = step.split('"', 4)
    is_envelope = len(parts) == 5 and [part.strip() for part in parts[::2][:2]] == ["{", ":{"]
    return f"{parts[1]}.{parts[3]}" if is_envelope else "?"
