"""`pgtask retry`: make tasks due now, with all their retries."""

from __future__ import annotations

import argparse
from typing import Any

from pgtask._cli.change_tasks import change_tasks, count_tasks
from pgtask._cli.database import with_connection
from pgtask._cli.options import ID_HELP, add_filters, task_filter, whole_number
from pgtask._cli.output import write_lines
from pgtask._cli.parser import Parser
from pgtask._postgres.listing import TaskFilter, list_tasks
from pgtask._postgres.tasks import retry_tasks
from pgtask.errors import ConfigError

__all__ = ["HELP", "SUMMARY", "add_arguments", "run"]

SUMMARY = "make tasks due now, with all their retries"
HELP = """\
Make tasks due now, at the step they are at: the error is cleared, and they have all retries of their policy again
(tried is 0). This is for parked and waiting tasks; one that a worker is running is left alone and named. A worker
runs them when it is their turn: the command does not wait for that.

With --parked, retry all tasks that are parked when the command reaches them, latest first, 5,000 in a transaction.
(UPDATE pg_task SET error = NULL does the same, but leaves tried: the next failure parks the task again.)
"""

CHUNK_SIZE = 5_000


def add_arguments(parser: Parser) -> None:
    parser.usage = (
        "pgtask retry ID...\n"
        "       pgtask retry --parked [-q NAME] [--task TASK]\n"
        "                    [--step STEP] [-n N]"
    )
    parser.add_argument("ids", nargs="*", metavar="ID", help=ID_HELP)
    parser.add_argument("--parked", action="store_true", help="all parked tasks, instead of IDs")
    add_filters(parser)
    parser.add_argument("-n", "--limit", type=whole_number(1), metavar="N", help="with --parked, no more than N")


def run(args: argparse.Namespace) -> int:
    limits = (args.queue, args.task, args.step, args.limit)
    if args.parked == bool(args.ids) or (args.ids and any(limit is not None for limit in limits)):
        raise ConfigError("give either IDs or --parked, which alone takes filters (see pgtask retry --help)")
    if args.parked:
        wanted = task_filter(args, ("parked",))
        done = with_connection(args, lambda connection: _retry_parked(connection, wanted, args.limit))
        write_lines([f"{count_tasks(done)} made due"])
        return 0
    return change_tasks(args, retry_tasks, "made due")


async def _retry_parked(connection: Any, wanted: TaskFilter, limit: int | None) -> int:
    """Retry from the latest parked task to the oldest: tasks that park again meanwhile lie behind, so this ends."""
    done, after = 0, None
    while limit is None or done < limit:
        chunk = CHUNK_SIZE if limit is None else min(CHUNK_SIZE, limit - done)
        page = await list_tasks(connection, wanted, limit=chunk, after=after, characters=0)
        done += sum(change.is_done for change in await retry_tasks(connection, [row.id for row in page.rows]))
        after = page.following
        if after is None:
            break
    return done
