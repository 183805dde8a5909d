"""What a client needs of its tables: `_postgres.client_store` has them in a database, `_memory.store` in memory.

Invariant: both answer alike; the conformance tests compare them.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from datetime import datetime
from typing import Any, Protocol
from uuid import UUID

from pgtask._copy import Source
from pgtask._ids import TaskId, TaskIds
from pgtask._postgres.failures import ParkedTask
from pgtask._validate import ItemEncoder, NewRow
from pgtask.groups import GroupStore
from pgtask.runs import RunStatus, RunStore
from pgtask.tasks import TaskStore
from pgtask.workflow import RunState

__all__ = ["ClientStore"]


class ClientStore(RunStore, Protocol):
    """The tables of a client, in a database or in memory."""

    @property
    def tasks(self) -> TaskStore:
        """The tasks that are in the table."""

    @property
    def groups(self) -> GroupStore:
        """The groups."""

    def check_connection(self, conn: Any = None) -> None:
        """Raise `EnqueueError` unless the connection of the caller, or without one this store, can be used here."""

    async def insert_task(self, row: NewRow, conn: Any) -> TaskId:
        """Insert a task, and return its id; with a key that another task has, do what the rule says, and return the id
        of the task that has the step then."""

    async def copy_tasks(self, source: Source, encode: ItemEncoder, conn: Any) -> Sequence[UUID]:
        """Insert a task for each item of the source, encoded by `encode`, all or none."""

    async def insert_keyed_tasks(self, source: Source, encode: ItemEncoder, conn: Any) -> list[TaskId]:
        """The same for items with keys, each as `insert_task` does."""

    def follow_failures(self) -> AsyncGenerator[ParkedTask, None]:
        """Yield the tasks that are parked from now on."""

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
        """Insert a run, and return its id, or that of the run that has its key."""

    async def insert_runs(
        self, ids: TaskIds, name: str, texts: Sequence[str], lane: tuple[str, int], conn: Any
    ) -> None:
        """Insert runs of one workflow, all or none."""

    async def list_statuses(
        self, name: str | None, state: RunState | None, limit: int, before: UUID | None
    ) -> list[RunStatus]:
        """Return the status of runs, the latest first."""
