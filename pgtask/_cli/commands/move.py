"""`pgtask move`: move waiting or parked tasks to another queue or priority."""

from __future__ import annotations

import argparse

from pgtask._cli.bulk import add_bulk, bulk_usage, change_named_or_chosen
from pgtask._cli.parser import Parser
from pgtask._postgres.task_changes import Move
from pgtask.errors import ConfigError
from pgtask.policy import check_priority, check_queue

__all__ = ["HELP", "SUMMARY", "add_arguments", "run"]

SUMMARY = "move tasks to another queue or priority"
HELP = """\
Move waiting or parked tasks to another queue, another priority, or both. A task that a worker is running is left alone
and named: its outcome says where it goes next. The next step of a task waits where the policy of that step says.

The filter by queue is --from, since --queue is where they go:

    pgtask move --queue slow --from default --task Report
"""


def add_arguments(parser: Parser) -> None:
    parser.usage = bulk_usage("move", "[-q NAME] [--priority N]", "--from NAMES")
    add_bulk(parser, queue_flags=("--from",))
    parser.add_argument("-q", "--queue", dest="to", metavar="NAME", help="the queue that they go to")
    parser.add_argument("--priority", type=int, metavar="N", help="the priority that they get")


def run(args: argparse.Namespace) -> int:
    if args.to is None and args.priority is None:
        raise ConfigError("give --queue, --priority, or both (see pgtask move --help)")
    try:
        queue = None if args.to is None else check_queue(args.to)
        priority = None if args.priority is None else check_priority(args.priority)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return change_named_or_chosen(args, Move(queue=queue, priority=priority), "moved")
