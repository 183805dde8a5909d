"""What people have done to many tasks: a row for each command."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

import msgspec

from pgtask._postgres.store import statement

__all__ = ["BulkAction", "ActionState", "begin_action", "note_action", "read_actions"]

ActionState = Literal["running", "done", "stopped", "failed"]


class BulkAction(msgspec.Struct, frozen=True):
    """A row of pg_task_actions, as of `seen_at`. One that is running goes on, or its process has died."""

    id: int
    began_at: datetime
    ended_at: datetime | None
    done_by: str
    action: str
    filter: str
    tasks: int
    state: ActionState
    seen_at: datetime


async def begin_action(connection: Any, by: str, action: str, filter: str) -> int:
    """Record the begin of an action; return its number."""
    return int(await connection.fetchval(statement("actions/begin"), by, action, filter))


async def note_action(connection: Any, number: int, tasks: int, state: ActionState) -> None:
    """Record how many tasks an action has changed so far, and its state."""
    await connection.execute(statement("actions/note"), number, tasks, state)


async def read_actions(connection: Any, limit: int) -> list[BulkAction]:
    """Return the last actions, the latest first."""
    return [BulkAction(*row) for row in await connection.fetch(statement("actions/last"), limit)]
