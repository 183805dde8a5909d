"""The values that a run and its journal exchange: rows of the tables of runs, and answers to entries."""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple
from uuid import UUID

__all__ = ["Checkpoint", "ChildRow", "History", "RunResult", "SignalResult"]


class Checkpoint(NamedTuple):
    """A row of `pg_task_checkpoints`. Result and error are both None while the run still waits for it.

    A step with `due_at` is put off until then: it has failed `tried` times, the last time with this error.
    """

    number: int
    place: str
    kind: str
    name: str
    result: str | None = None
    error: str | None = None
    due_at: datetime | None = None
    tried: int = 0
    seconds: float = 0.0

    @property
    def size(self) -> int:
        """The characters of the texts of the user."""
        return len(self.result or "") + len(self.error or "")

    @property
    def is_postponed(self) -> bool:
        """True if it is that of a step which is tried again at `due_at`."""
        return self.kind == "step" and self.due_at is not None

    @property
    def is_progress(self) -> bool:
        """True if it takes its run further: not if it says that a step is tried again."""
        return not self.is_postponed or self.result is not None

    @property
    def is_complete(self) -> bool:
        """True if it has the result of its call, or the last error. It never changes then."""
        return (self.result is not None or self.error is not None) and not self.is_postponed


class History(NamedTuple):
    """The recorded history of a run, as of `seen_at` by the clock of the database.

    - `wakeup_at`: that of its task; None if the task is gone.
    - `is_known`: whether the run has a record. `state`: None, or the end that the record says.
    - `version`: the version of the workflow; None before its first checkpoint.
    """

    wakeup_at: datetime | None
    is_known: bool
    version: int | None
    state: str | None
    checkpoints: list[Checkpoint]
    seen_at: datetime


class ChildRow(NamedTuple):
    """The row of a child that is to be made."""

    id: UUID
    name: str
    step: str
    queue: str
    priority: int


class SignalResult(NamedTuple):
    """The answer to a look for a signal: its payload, or the error that its time has passed, or neither yet.

    `due_at` is the end of that time; `wakeup_at` that of the task as of the look.
    """

    result: str | None
    error: str | None
    due_at: datetime | None
    wakeup_at: datetime

    @property
    def is_over(self) -> bool:
        """True if the wait has ended."""
        return self.result is not None or self.error is not None


class RunResult(NamedTuple):
    """The end of a run: `state` is SUCCESS with its output, ERROR with its error, or CANCELLED."""

    state: str
    output: str | None
    error: str | None
