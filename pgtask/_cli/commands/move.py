"""`pgtask move`: move waiting or parked tasks to another queue or priority."""

from __future__ import annotations

import argparse

from pgtask._cli.change_tasks import change_tasks
from pgtask._cli.options import ID_HELP
from pgtask._cli.parser import Parser
from pgtask._postgres.task_changes import Move
from pgtask.errors import ConfigError
from pgtask.policy import check_priority, check_queue

__all__ = ["HELP", "SUMMARY", "add_arguments", "run"]

SUMMARY = "move tasks to another queue or priority"
HELP = """\
Move waiting or parked tasks to another queue, another priority, or both. A task that a worker is running is left alone
and named: its outcome says where it goes next. The next step of a task waits where the policy of that step says.
"""


def add_arguments(parser: Parser) -> None:
    parser.add_argument("ids", nargs="+", metavar="ID", help=ID_HELP)
    parser.add_argument("-q", "--queue", metavar="NAME", help="the queue that they go to")
    parser.add_argument("--priority", type=int, metavar="N", help="the priority that they get")


def run(args: argparse.Namespace) -> int:
    if args.queue is None and args.priority is None:
        raise ConfigError("give --queue, --priority, or both (see pgtask move --help)")
    try:
        queue = None if args.queue is None else check_queue(args.queue)
        priority = None if args.priority is None else check_priority(args.priority)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return change_tasks(args, Move(queue=queue, priority=priority), "moved")
