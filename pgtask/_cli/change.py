"""The commands that change tasks which are there: `retry` and `cancel`.

Invariant: each task that was named and not changed is named again, with the reason, and the exit code says so.
"""

from __future__ import annotations

import argparse
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any
from uuid import UUID

import msgspec

from pgtask._cli.arguments import SOME_FAILED
from pgtask._cli.database import with_connection
from pgtask._cli.look import task_filter
from pgtask._cli.names import TaskName
from pgtask._cli.output import say, show
from pgtask._cli.rows import refusal
from pgtask._postgres.listing import TaskFilter, list_tasks
from pgtask._postgres.runs import cancel_runs
from pgtask._postgres.tasks import Verdict, cancel, retry
from pgtask.errors import ConfigError

__all__ = ["cancel_command", "retry_command"]

RETRY_CHUNK = 5_000


def retry_command(args: argparse.Namespace) -> int:
    limits = (args.queue, args.task, args.step, args.limit)
    if args.parked == bool(args.ids) or (args.ids and any(limit is not None for limit in limits)):
        raise ConfigError("give either IDs or --parked, which alone takes filters (see pgtask retry --help)")
    if args.parked:
        wanted = task_filter(args, ("parked",))
        done = with_connection(args, lambda connection: _retry_parked(connection, wanted, args.limit))
        show([f"{_number(done)} retried"])
        return 0
    return _change(args, retry, "retried")


async def _retry_parked(connection: Any, wanted: TaskFilter, limit: int | None) -> int:
    """Latest first, so that what is parked anew meanwhile lies behind us, and this comes to an end."""
    done, after = 0, None
    while limit is None or done < limit:
        chunk = RETRY_CHUNK if limit is None else min(RETRY_CHUNK, limit - done)
        page = await list_tasks(connection, wanted, limit=chunk, after=after, characters=0)
        done += sum(verdict.is_done for verdict in await retry(connection, [row.id for row in page.rows]))
        after = page.following
        if after is None:
            break
    return done


def cancel_command(args: argparse.Namespace) -> int:
    return _change(args, partial(_cancel, force=args.force), "cancelled")


async def _cancel(connection: Any, ids: list[UUID], *, force: bool) -> list[Verdict]:
    """The runs of workflows among them keep their records, and their children go with them."""
    runs = set(await cancel_runs(connection, ids, force=force))
    verdicts = await cancel(connection, ids, force=force)
    return [
        msgspec.structs.replace(verdict, is_done=True, was_there=True) if verdict.id in runs else verdict
        for verdict in verdicts
    ]


def _change(args: argparse.Namespace, change: Callable[[Any, list[UUID]], Awaitable[list[Verdict]]], done: str) -> int:
    """Change the tasks that were named, and say what became of each."""
    names = [TaskName.parse(word) for word in args.ids]

    async def find_and_change(connection: Any) -> tuple[list[Verdict], list[str]]:
        ids, refusals = [], []
        for name in names:
            found = await name.find(connection)
            if isinstance(found, UUID):
                ids.append(found)
            else:
                refusals.append(f"{name.text}: {found}")
        return await change(connection, ids), refusals

    verdicts, refusals = with_connection(args, find_and_change)
    refused = [f"{verdict.id}: {reason}" for verdict in verdicts if (reason := refusal(verdict)) is not None]
    show([f"{_number(len(verdicts) - len(refused))} {done}"])
    for line in (*refused, *refusals):
        say(line)
    return SOME_FAILED if refused or refusals else 0


def _number(tasks: int) -> str:
    return f"{tasks:,} task{'' if tasks == 1 else 's'}"
