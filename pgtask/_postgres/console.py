"""The statements of the console: leases by worker, parked tasks by cause, tasks by step, and the parts of a run.

Invariant: each reads a bounded number of index entries, and changes and locks nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

import msgspec

from pgtask._postgres.runs import CheckpointRow
from pgtask._postgres.store import statement
from pgtask._postgres.tasks import plain_values

__all__ = [
    "MAX_CHECKPOINTS",
    "MAX_CHILDREN",
    "MAX_FOLDED",
    "ParkedGroup",
    "StepCount",
    "WorkerLeases",
    "count_steps",
    "fold_causes",
    "read_children",
    "read_last_checkpoints",
    "read_leases",
]

MAX_FOLDED = 5_000
"""The most tasks of a state that a page reads to fold or count them."""
MAX_CHECKPOINTS = 300
MAX_CHILDREN = 100


class WorkerLeases(msgspec.Struct, frozen=True):
    """The tasks that one worker has leased. `expired`: those whose lease it has not renewed."""

    worker: str
    tasks: int
    expired: int
    queue: str
    ends_at: datetime
    seen_at: datetime


class ParkedGroup(msgspec.Struct, frozen=True):
    """Parked tasks of one step and one cause; `read` counts those of all causes that were read."""

    task: str
    step: str
    cause: str
    tasks: int
    read: int
    first_at: datetime
    last_at: datetime
    example: UUID
    seen_at: datetime

    @property
    def pattern(self) -> str:
        """The pattern of LIKE that finds these tasks by their error."""
        escaped = self.cause.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
        return escaped.replace("#", "%") + "%"


class StepCount(msgspec.Struct, frozen=True):
    """The tasks of a step in one state. `is_cut`: more tasks of this state were not read."""

    state: str
    task: str
    step: str
    tasks: int
    is_cut: bool


async def read_leases(connection: Any) -> list[WorkerLeases]:
    """Return the leases of each worker, those with the most tasks first."""
    rows = await connection.fetch(statement("web/leases"), MAX_FOLDED)
    return [WorkerLeases(**plain_values(row)) for row in rows]


async def fold_causes(connection: Any) -> list[ParkedGroup]:
    """Return the causes of the tasks that were parked last, the most frequent first."""
    rows = await connection.fetch(statement("web/causes"), MAX_FOLDED)
    return [ParkedGroup(**plain_values(row)) for row in rows]


async def count_steps(connection: Any) -> list[StepCount]:
    """Return how many tasks are at each step, by state."""
    return [StepCount(*row) for row in await connection.fetch(statement("web/steps"), MAX_FOLDED)]


async def read_last_checkpoints(connection: Any, run: UUID, characters: int) -> Sequence[CheckpointRow]:
    """Return the last checkpoints of a run in their order; of results and errors the first `characters`."""
    rows = await connection.fetch(statement("web/checkpoints"), run, characters, MAX_CHECKPOINTS)
    return [CheckpointRow(**plain_values(row)) for row in reversed(rows)]


async def read_children(connection: Any, run: UUID) -> list[UUID]:
    """Return some of the children of a run, in the order of their ids."""
    return sorted(UUID(int=row[0].int) for row in await connection.fetch(statement("web/children"), run, MAX_CHILDREN))
