"""The statements of the console: tasks by step, and the parts of a run.

Invariant: each reads a bounded number of index entries, and changes and locks nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID

import msgspec

from pgtask._postgres.causes import ParkedCause, fold_causes
from pgtask._postgres.listing import TaskFilter
from pgtask._postgres.runs import CheckpointRow
from pgtask._postgres.store import statement
from pgtask._postgres.tasks import plain_values

__all__ = [
    "MAX_CHECKPOINTS",
    "MAX_CHILDREN",
    "MAX_FOLDED",
    "StepCount",
    "count_steps",
    "fold_group",
    "read_children",
    "read_last_checkpoints",
]

MAX_FOLDED = 5_000
"""The most tasks of a state that a page reads to fold or count them."""
MAX_CHECKPOINTS = 300
MAX_CHILDREN = 100


class StepCount(msgspec.Struct, frozen=True):
    """The tasks of a step in one state. `is_cut`: more tasks of this state were not read."""

    state: str
    task: str
    step: str
    tasks: int
    is_cut: bool


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


async def fold_group(connection: Any, name: str) -> list[ParkedCause]:
    """Return the causes of parked members of a group, of `MAX_FOLDED` of them at most."""
    return await fold_causes(connection, TaskFilter(states=("parked",), group=name), last=MAX_FOLDED)
