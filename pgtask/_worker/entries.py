"""What goes into the journal and comes out of it, as values.

Invariant: nothing here touches a database, so that a journal in memory can serve the same runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple, Protocol
from uuid import UUID

from pgtask._fastpath import Lease

__all__ = ["Checkpoint", "ChildRow", "Ended", "Entry", "History", "Journalled", "Pause", "Taken"]


class Checkpoint(NamedTuple):
    """A row of `pg_task_checkpoints`. Result and error are both None in one that is still waited for.

    A step with `due_at` is put off until then: it has failed `tried` times, the last time for this error.
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


class History(NamedTuple):
    """What is recorded of a run. `version` is None before its first checkpoint; `state` is set in a record that says
    that the run has ended, or `None`; `is_known` says whether there is a record."""

    wakeup_at: datetime | None
    is_known: bool
    version: int | None
    state: str | None
    checkpoints: list[Checkpoint]


class ChildRow(NamedTuple):
    """A run to be made."""

    id: UUID
    name: str
    step: str
    queue: str
    priority: int


class Pause(NamedTuple):
    """Why and until when a run is let go: not if its task's wakeup_at is no longer `seen_at`.

    `due_at` None is for ever; `tried` counts failed tries outside of steps. With `children` it is woken when all of
    them have ended, or `any_child`.
    """

    seen_at: datetime | None
    due_at: datetime | None
    tried: int
    waits_on: str
    any_child: bool
    children: list[UUID]


class Taken(NamedTuple):
    """What came of the look for a signal: its payload, or the error that the time for it is over, or neither yet; when
    that is; and the task's wakeup_at as of the look."""

    result: str | None
    error: str | None
    due_at: datetime | None
    wakeup_at: datetime

    @property
    def is_over(self) -> bool:
        """Whether the wait for it is."""
        return self.result is not None or self.error is not None


class Ended(NamedTuple):
    """How a run has ended: `state` SUCCESS with its output, ERROR with its error, or CANCELLED."""

    state: str
    output: str | None
    error: str | None


class Entry:
    """Something that waits to be written under a lease. `columns` are its values, in the order of its statement."""

    __slots__ = ("busy", "children", "columns", "lease", "written")

    def __init__(self, lease: Lease, columns: tuple[Any, ...], children: list[Any], written: asyncio.Future[Any]):
        self.busy = 0.0  # seconds of the last wait for a task that somebody else had locked
        self.lease = lease
        self.columns = columns
        self.children = children
        self.written = written


class Journalled(Protocol):
    """What a run asks of the journal. Each future is done when what it is about is durable; it gets `RunStopped` when
    the lease is no longer held, and then nothing was written."""

    def now(self) -> datetime:
        """The time by the clock of the database."""

    def load(self, run: UUID) -> asyncio.Future[History]:
        """What is recorded of a run."""

    def adopt(self, lease: Lease, name: str) -> asyncio.Future[None]:
        """Make a record for a live run that has none, or only that of an end before it was revived."""

    def collect(self, runs: list[UUID]) -> asyncio.Future[dict[UUID, Ended]]:
        """Those of the runs that have ended."""

    def record(self, lease: Lease, checkpoint: Checkpoint, version: int | None) -> asyncio.Future[None]:
        """Record a checkpoint, or complete that of a step that was put off; with `version` if it is the run's first."""

    def spawn(
        self, lease: Lease, checkpoint: Checkpoint, version: int | None, children: list[ChildRow]
    ) -> asyncio.Future[None]:
        """Make children, and record that they were made."""

    def take(self, lease: Lease, checkpoint: Checkpoint, version: int | None) -> asyncio.Future[Taken]:
        """Take the oldest signal of the checkpoint's name, if there is one, and record it."""

    def pause(self, lease: Lease, pause: Pause) -> asyncio.Future[datetime | None]:
        """Let go of the run until something happens; None, or its wakeup_at if something has happened already."""

    def end(
        self, lease: Lease, *, output: str | None, error: str | None, tried: int, forgotten: Sequence[int], version: int
    ) -> asyncio.Future[None]:
        """End the run with an output; or with an error, which parks its task. Forgets the checkpoints `forgotten`."""
