"""`pgtask resume`: resume failed or cancelled runs, and wake paused ones."""

from __future__ import annotations

import argparse
from typing import Any

from pgtask._cli.database import with_connection
from pgtask._cli.names import Name, resolve_names
from pgtask._cli.options import ID_HELP
from pgtask._cli.output import note_failures, write_lines
from pgtask._cli.parser import Parser
from pgtask._postgres.runs import resume_runs

__all__ = ["HELP", "SUMMARY", "add_arguments", "run"]

SUMMARY = "resume failed or cancelled runs"
HELP = """\
Resume runs that failed (ERROR) or were cancelled, from their checkpoints, with all their retries; wake paused ones, to
check again what they wait for. A run that a worker is running, or that has succeeded, is named.
"""

NOTHING_TO_RESUME = "it is being run, due, scheduled or has succeeded, or there is no such run"


def add_arguments(parser: Parser) -> None:
    parser.add_argument("ids", nargs="+", metavar="ID", help=ID_HELP)


def run(args: argparse.Namespace) -> int:
    names = [Name.parse(word, is_run=True) for word in args.ids]

    async def resolve_and_resume(connection: Any) -> tuple[int, list[str]]:
        ids, refusals = await resolve_names(connection, names)
        runs = list(dict.fromkeys(ids))
        resumed, taken = await resume_runs(connection, runs)
        reasons = {one.run: str(one) for one in taken}
        left = (run for run in runs if run not in resumed)
        return len(resumed), [*(f"{run}: {reasons.get(run, NOTHING_TO_RESUME)}" for run in left), *refusals]

    resumed, refusals = with_connection(args, resolve_and_resume)
    write_lines([f"{resumed:,} run{'' if resumed == 1 else 's'} resumed"])
    return note_failures(refusals) if refusals else 0
