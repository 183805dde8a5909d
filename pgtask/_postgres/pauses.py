"""Pauses: queues, tasks and steps of which no worker or consumer starts a task, as rows.

Invariant: a thing that is paused twice is resumed by one call.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from typing import Any, Literal, NamedTuple

import msgspec

from pgtask._postgres.store import statement

__all__ = ["Pause", "Paused", "pause", "read_pauses", "unpause"]

Kind = Literal["queue", "task", "step"]


class Paused(NamedTuple):
    """A thing that can be paused: a queue, a task or workflow, or a step (`Task.Step`)."""

    kind: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


class Pause(msgspec.Struct, frozen=True):
    """A row of pg_task_pauses, as of `seen_at`."""

    kind: str
    name: str
    reason: str | None
    paused_at: datetime
    paused_by: str
    seen_at: datetime

    @property
    def paused(self) -> Paused:
        """What is paused."""
        return Paused(self.kind, self.name)


async def read_pauses(connection: Any) -> list[Pause]:
    """Return all pauses, by kind and name."""
    return [Pause(*row) for row in await connection.fetch(statement("pauses"))]


async def pause(connection: Any, things: Collection[Paused], reason: str | None, by: str | None) -> set[Paused]:
    """Pause things. Return those that were not paused."""
    kinds, names = [thing.kind for thing in things], [thing.name for thing in things]
    return {Paused(*row) for row in await connection.fetch(statement("pause"), kinds, names, reason, by)}


async def unpause(connection: Any, things: Collection[Paused] | None) -> set[Paused]:
    """Resume things, or all that are paused. Return those that were paused."""
    both = (None, None) if things is None else ([one.kind for one in things], [one.name for one in things])
    return {Paused(*row) for row in await connection.fetch(statement("unpause"), *both)}
