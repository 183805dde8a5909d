"""`pgtask cancel`: remove waiting or parked tasks; with `--force`, running ones."""

from __future__ import annotations

import argparse

from pgtask._cli.change_tasks import change_tasks
from pgtask._cli.options import ID_HELP
from pgtask._cli.parser import Parser
from pgtask._postgres.task_changes import Cancel

__all__ = ["HELP", "SUMMARY", "add_arguments", "run"]

SUMMARY = "remove tasks"
HELP = """\
Remove waiting or parked tasks from the table. A task that a worker is running is left alone and named.

With --force it is removed as well. Its worker keeps running the step until its next renewal and then drops the
outcome; side effects are not undone.
"""


def add_arguments(parser: Parser) -> None:
    parser.add_argument("ids", nargs="+", metavar="ID", help=ID_HELP)
    parser.add_argument("--force", action="store_true", help="also those that a worker is running")


def run(args: argparse.Namespace) -> int:
    return change_tasks(args, Cancel(force=args.force), "cancelled")
