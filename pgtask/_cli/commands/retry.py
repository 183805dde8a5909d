"""`pgtask retry`: make tasks due now, with all their retries."""

from __future__ import annotations

import argparse

from pgtask._cli.bulk import add_bulk, bulk_usage, change_named_or_chosen
from pgtask._cli.parser import Parser
from pgtask._postgres.task_changes import Retry

__all__ = ["HELP", "SUMMARY", "add_arguments", "run"]

SUMMARY = "make tasks due now, with all their retries"
HELP = """\
Make tasks due now, at the step they are at: the error is cleared, and they have all retries of their policy again
(tried is 0). This is for parked and waiting tasks; one that a worker is running is left alone and named. A worker
runs them when it is their turn: the command does not wait for that.

With filters, or --all, retry the parked tasks that they choose (with --state, those of another state), latest first,
2,000 in a transaction.
(UPDATE pg_task SET error = NULL does the same, but leaves tried: the next failure parks the task again.)

    pgtask retry --error 'Timeout%' --age 1h --rate 500/s
"""


def add_arguments(parser: Parser) -> None:
    parser.usage = bulk_usage("retry")
    add_bulk(parser)


def run(args: argparse.Namespace) -> int:
    return change_named_or_chosen(args, Retry(), "made due", states=("parked",))
