"""`pgtask actions`: who did what to how many tasks."""

from __future__ import annotations

import argparse
import sys

import msgspec

from pgtask._cli.database import with_connection
from pgtask._cli.options import add_json, add_page
from pgtask._cli.output import json_line, note, write_lines
from pgtask._cli.parser import Parser
from pgtask._cli.quantities import relative_time
from pgtask._cli.tables import Column, detect_screen, table_lines
from pgtask._postgres.actions import BulkAction, read_actions

__all__ = ["HELP", "SUMMARY", "add_arguments", "run"]

SUMMARY = "show who did what to how many tasks"
HELP = """\
List the last commands that changed tasks by a filter, and those that paused or resumed something: when, who, what, and
how many tasks they have changed. A command that is running without an end goes on, or was killed. pgtask prune removes
old ones.
"""


def add_arguments(parser: Parser) -> None:
    add_page(parser, "actions")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    actions = with_connection(args, lambda connection: read_actions(connection, args.limit))
    if args.json:
        write_lines(json_line(msgspec.structs.asdict(one)) for one in actions)
    elif actions:
        write_lines(table_lines(COLUMNS, actions, detect_screen(sys.stdout), text=FILTER))
    else:
        note("no actions")
    return 0


COLUMNS = (
    Column[BulkAction]("when", lambda one: relative_time(one.began_at, one.seen_at), is_number=True),
    Column[BulkAction]("by", lambda one: one.done_by, rank=1),
    Column[BulkAction]("tasks", lambda one: f"{one.tasks:,}", is_number=True),
    Column[BulkAction]("state", lambda one: one.state, usual="done"),
    Column[BulkAction]("action", lambda one: one.action),
)
FILTER = Column[BulkAction]("filter", lambda one: one.filter)
