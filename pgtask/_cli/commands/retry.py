"""`pgtask retry`: make tasks due now, with all their retries."""

from __future__ import annotations

import argparse

from pgtask._cli.change_tasks import change_chosen, change_tasks, count_tasks
from pgtask._cli.database import with_connection
from pgtask._cli.options import ID_HELP, add_filters, has_filters, task_filter, whole_number
from pgtask._cli.output import write_lines
from pgtask._cli.parser import Parser
from pgtask._postgres.task_changes import Retry
from pgtask.errors import ConfigError

__all__ = ["HELP", "SUMMARY", "add_arguments", "run"]

SUMMARY = "make tasks due now, with all their retries"
HELP = """\
Make tasks due now, at the step they are at: the error is cleared, and they have all retries of their policy again
(tried is 0). This is for parked and waiting tasks; one that a worker is running is left alone and named. A worker
runs them when it is their turn: the command does not wait for that.

With --parked, retry all tasks that are parked when the command reaches them, latest first, 2,000 in a transaction.
(UPDATE pg_task SET error = NULL does the same, but leaves tried: the next failure parks the task again.)
"""


def add_arguments(parser: Parser) -> None:
    parser.usage = (
        "pgtask retry ID...\n"
        "       pgtask retry --parked [-q NAMES] [--task TASK]\n"
        "                    [--step STEP] [--key KEY]\n"
        "                    [--error PATTERN] [--age TIME] [-n N]"
    )
    parser.add_argument("ids", nargs="*", metavar="ID", help=ID_HELP)
    parser.add_argument("--parked", action="store_true", help="all parked tasks, instead of IDs")
    add_filters(parser)
    parser.add_argument("-n", "--limit", type=whole_number(1), metavar="N", help="with --parked, no more than N")


def run(args: argparse.Namespace) -> int:
    if args.parked == bool(args.ids) or (args.ids and (has_filters(args) or args.limit is not None)):
        raise ConfigError("give either IDs or --parked, which alone takes filters (see pgtask retry --help)")
    if args.parked:
        wanted = task_filter(args, ("parked",))
        done = with_connection(args, lambda connection: change_chosen(connection, wanted, Retry(), limit=args.limit))
        write_lines([f"{count_tasks(done)} made due"])
        return 0
    return change_tasks(args, Retry(), "made due")
