"""`pgtask reschedule`: make waiting or parked tasks due at another time."""

from __future__ import annotations

import argparse

from pgtask._cli.bulk import add_bulk, bulk_usage, change_named_or_chosen
from pgtask._cli.options import TIME_HELP, parse_seconds, parse_time
from pgtask._cli.parser import Parser
from pgtask._postgres.task_changes import Reschedule

__all__ = ["HELP", "SUMMARY", "add_arguments", "run"]

SUMMARY = "make tasks due at another time"
HELP = """\
Make tasks due at a time, or after one, by the clock of the database: all of them at the same time. Parked ones go on
then, without an error and with all their retries. A task that a worker is running is left alone and named, and so is a
run that pauses: what it waits for wakes it.

    pgtask reschedule --after 2h --step Order.Charge
"""


def add_arguments(parser: Parser) -> None:
    parser.usage = bulk_usage("reschedule", "(--after TIME | --at WHEN)")
    add_bulk(parser)
    when = parser.add_mutually_exclusive_group(required=True)
    when.add_argument("--after", type=parse_seconds, metavar="TIME", help=f"due after a time: {TIME_HELP}")
    when.add_argument("--at", type=parse_time, metavar="WHEN", help="due at a time, as 2026-12-24T18:00:00+01:00")


def run(args: argparse.Namespace) -> int:
    return change_named_or_chosen(args, Reschedule(at=args.at, delay=args.after), "rescheduled")
