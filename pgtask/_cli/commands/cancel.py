"""`pgtask cancel`: remove waiting or parked tasks; with `--force`, running ones."""

from __future__ import annotations

import argparse

from pgtask._cli.bulk import add_bulk, bulk_usage, change_named_or_chosen
from pgtask._cli.parser import Parser
from pgtask._postgres.task_changes import Cancel

__all__ = ["HELP", "SUMMARY", "add_arguments", "run"]

SUMMARY = "remove tasks"
HELP = """\
Remove waiting or parked tasks from the table. A task that a worker is running is left alone; one that you named by its
id is named. A run is cancelled with its children.

With --force it is removed as well. Its worker keeps running the step until its next renewal and then drops the
outcome; side effects are not undone.

    pgtask cancel --task Report --where id=42 --dry-run
"""


def add_arguments(parser: Parser) -> None:
    parser.usage = bulk_usage("cancel", "[--force]")
    add_bulk(parser)
    parser.add_argument("--force", action="store_true", help="also those that a worker is running")


def run(args: argparse.Namespace) -> int:
    return change_named_or_chosen(args, Cancel(force=args.force), "cancelled")
