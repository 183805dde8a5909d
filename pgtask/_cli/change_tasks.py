"""Changes of tasks that a person names, for `retry`, `cancel`, `move` and `reschedule`.

Invariant: a task that was named and not changed is named again, with the reason, and the exit code says so.
"""

from __future__ import annotations

import argparse
from typing import Any

from pgtask._cli.database import with_connection
from pgtask._cli.names import NO_SUCH_TASK, Name, resolve_names
from pgtask._cli.output import note_failures, write_lines
from pgtask._postgres.task_changes import Change, apply_change
from pgtask._postgres.tasks import TaskChange

__all__ = ["change_tasks", "count_tasks"]


def change_tasks(args: argparse.Namespace, change: Change, done: str) -> int:
    """Change the tasks that `args.ids` names and report how many are `done`; return the exit code."""
    names = [Name.parse(word) for word in args.ids]

    async def resolve_and_change(connection: Any) -> tuple[list[TaskChange], list[str]]:
        ids, refusals = await resolve_names(connection, names)
        return await apply_change(connection, ids, change), refusals

    changes, refusals = with_connection(args, resolve_and_change)
    refused = [f"{one.id}: {reason}" for one in changes if (reason := _explain_refusal(one)) is not None]
    write_lines([f"{count_tasks(len(changes) - len(refused))} {done}"])
    return note_failures([*refused, *refusals]) if refused or refusals else 0


def count_tasks(number: int) -> str:
    return f"{number:,} task{'' if number == 1 else 's'}"


def _explain_refusal(change: TaskChange) -> str | None:
    """Return why a task was not changed; None if it was."""
    if change.is_done:
        return None
    if not change.was_there:
        return NO_SUCH_TASK
    if change.leased_until is not None and change.leased_until >= change.seen_at:
        return "it is being run, under a live lease"
    return "another session took or changed it just now; try again"
