"""`pgtask runs`: the runs of workflows, latest first, page by page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any, get_args
from uuid import UUID

from pgtask._cli.database import with_connection
from pgtask._cli.names import Name
from pgtask._cli.options import add_json, add_page
from pgtask._cli.output import json_line, note, note_failures, write_lines
from pgtask._cli.parser import Parser
from pgtask._cli.quantities import relative_time
from pgtask._cli.run_rows import RUN_COLOURS, run_fields
from pgtask._cli.tables import Column, Screen, detect_screen, one_line, table_lines
from pgtask._postgres.runs import RunStatus, list_runs
from pgtask.workflow import RunState

__all__ = ["HELP", "SUMMARY", "add_arguments", "run", "run_lines"]

SUMMARY = "list runs of workflows"
HELP = """\
List the runs of workflows, latest first, also those that have ended. A page is --limit runs; stderr names the --before
of the next page. With --state, a page reads at most 100,000 runs.
A run inserted by plain SQL is listed once a worker has begun it; until then list and run show it.
"""

COLUMNS: tuple[Column[RunStatus], ...] = (
    Column("id", lambda run: str(run.id), is_id=True),
    Column("state", lambda run: run.state, colours=RUN_COLOURS),
    Column("workflow", lambda run: run.name or "-", is_name=True),
    Column("created", lambda run: relative_time(run.created_at, run.seen_at), rank=2),
    Column("recorded", lambda run: str(run.recorded), is_number=True, rank=1),
    Column("last", lambda run: run.last_step or "-", usual="-", rank=3, is_name=True),
    Column("waits on", lambda run: run.waits_on or "-", usual="-", rank=4, is_name=True),
)
ERROR: Column[RunStatus] = Column("error", lambda run: one_line(run.error or ""))


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--name", metavar="WORKFLOW", help="only of this workflow")
    states = get_args(RunState)
    parser.add_argument(
        "--state", type=str.upper, choices=states, metavar="STATE", help=f"only in this state: {', '.join(states)}"
    )
    add_page(parser, "runs")
    parser.add_argument("--before", metavar="ID", help="continue before this run")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    before = None if args.before is None else Name.parse(args.before, is_run=True)

    async def read_page(connection: Any) -> tuple[list[RunStatus], UUID | None] | list[str]:
        found = None if before is None else await before.resolve(connection)
        if isinstance(found, list):
            return found
        return await list_runs(connection, name=args.name, state=args.state, limit=args.limit, before=found)

    page = with_connection(args, read_page)
    if isinstance(page, list):
        return note_failures(page)
    found, following = page
    if args.json:
        write_lines(json_line(run_fields(status)) for status in found)
    elif found:
        write_lines(run_lines(found, detect_screen(sys.stdout)))
    elif following is None:
        note("no runs match" if args.name or args.state or args.before else "no runs")
    if following is not None:
        note(f"there may be more: --before {following}")
    return 0


def run_lines(runs: Sequence[RunStatus], screen: Screen) -> Iterator[str]:
    """Yield the table."""
    return table_lines(COLUMNS, runs, screen, text=ERROR)
