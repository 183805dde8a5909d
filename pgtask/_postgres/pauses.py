"""Pauses: queues, tasks, steps and keys of which no worker or consumer starts a task, as rows.

Invariants: a thing that is paused twice is resumed by one call; whatever changes a pause leaves a row of who did it, in
the same transaction.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from typing import Any, Literal, NamedTuple

import msgspec

from pgtask._postgres.actions import begin_action, note_action
from pgtask._postgres.store import statement

__all__ = ["GROUPS", "Pause", "Paused", "pause", "read_pauses", "resume"]

Kind = Literal["queue", "task", "step", "key"]


GROUPS = "groups"
"""The kind of the row which says that there are groups of tasks that have not ended."""


class Paused(NamedTuple):
    """A thing that can be paused: a queue, a task or workflow, a step (`Task.Step`), or a key as its column has it
    (`Task/key`)."""

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


async def pause(connection: Any, things: Collection[Paused], reason: str | None, by: str) -> set[Paused]:
    """Pause things in the name of `by`. Return those that were not paused."""
    return await _change(connection, "pause", _columns(things), (reason, by), by)


async def resume(connection: Any, things: Collection[Paused] | None, by: str) -> set[Paused]:
    """Resume things, or all that are paused, in the name of `by`. Return those that were paused."""
    return await _change(connection, "resume", (None, None) if things is None else _columns(things), (), by)


def _columns(things: Collection[Paused]) -> tuple[list[str], list[str]]:
    return [thing.kind for thing in things], [thing.name for thing in things]


async def _change(
    connection: Any, action: str, columns: tuple[Any, Any], more: tuple[Any, ...], by: str
) -> set[Paused]:
    async with connection.transaction():
        changed = {Paused(*row) for row in await connection.fetch(statement(action), *columns, *more)}
        if changed:
            number = await begin_action(connection, by, action, ", ".join(map(str, sorted(changed))))
            await note_action(connection, number, 0, "done")
    return changed
