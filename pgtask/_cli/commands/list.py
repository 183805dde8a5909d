"""`pgtask list`: the tasks, state by state, page by page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import zip_longest

from pgtask._cli.database import with_connection
from pgtask._cli.options import add_filters, add_json, add_page, has_filters, task_filter
from pgtask._cli.output import note, write_lines
from pgtask._cli.parser import Parser
from pgtask._cli.quantities import relative_time
from pgtask._cli.tables import Column, Screen, detect_screen, one_line, printable, shown_id, table_lines
from pgtask._cli.task_rows import STATE_COLOURS, task_json
from pgtask._postgres.listing import SCAN_LIMIT, STATES, Cursor, list_tasks
from pgtask._postgres.task_status import step_label
from pgtask._postgres.tasks import TaskRow
from pgtask.errors import ConfigError

__all__ = ["HELP", "SUMMARY", "add_arguments", "list_lines", "run"]

SUMMARY = "list tasks"
HELP = f"""\
List tasks from the indexes of the table, state by state:

    leased     a worker runs it; soonest-expiring first
    ready      due, waits for a worker; in claim order
    scheduled  due later, behind the task that has its
               key, or behind its limit; in the same order
    parked     waits for you, with its error; latest first

A page is --limit tasks. stderr names the --after of the next page; with --json, each object has its cursor. With a
filter, a page reads at most {SCAN_LIMIT:,} tasks; stderr says where it stopped. The tasks with a key are one page.

On a terminal, an id is shown by its last 8 digits, which every command takes; columns without room are left out or
cut. In a pipe, nothing is left out or cut.
"""

TABLE_CHARACTERS = 1024  # of a step and an error, of which the table shows the beginnings


def _describe_time(row: TaskRow, screen: Screen) -> str:
    """Return the due time; of a leased task the end of its lease, of a parked one the time of its parking; of one that
    waits behind another, the id of that; of one that waits for a limit, its name and key."""
    if row.behind is not None and row.state == "scheduled":
        return "is next" if row.behind_id is None else f"behind {shown_id(str(row.behind_id), screen)}"
    if row.limit_key is not None and row.state == "scheduled":
        return f"limit {printable(row.limit_key.rstrip())}"
    if row.state == "leased" and row.lock_expires_at is not None:
        verb = "expired" if row.lock_expires_at < row.seen_at else "ends"
        return f"{verb} {relative_time(row.lock_expires_at, row.seen_at)}"
    return relative_time(row.wakeup_at, row.seen_at)  # which parking sets


COLUMNS: tuple[Column[TaskRow], ...] = (
    Column("id", lambda row: str(row.id), is_id=True),
    Column("state", lambda row: row.state, colours=STATE_COLOURS),
    Column("step", lambda row: step_label(row.step), is_name=True),
    Column("queue", lambda row: row.queue, usual="default", rank=3, is_name=True),
    Column("prio", lambda row: str(row.priority), is_number=True, usual="0", rank=1),
    Column("tried", lambda row: str(row.tried), is_number=True, usual="0", rank=2),
)
CLAIMS: Column[TaskRow] = Column("claims", lambda row: str(row.claims), is_number=True, rank=4)
ERROR: Column[TaskRow] = Column("error", lambda row: one_line(row.error or ""))


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--state", type=str.lower, choices=STATES, help="only this state")
    add_filters(parser)
    add_page(parser, "tasks")
    parser.add_argument("--after", metavar="CURSOR", help="continue after this place")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    wanted = task_filter(args, (args.state,) if args.state else STATES)
    after = None
    if args.after is not None:
        if args.key is not None:
            raise ConfigError("--key gives one page: leave out --after")
        try:
            after = Cursor.parse(args.after)
        except ValueError:
            raise ConfigError(f"--after {args.after}: is not a cursor that `pgtask list` gave") from None
    characters = None if args.json else TABLE_CHARACTERS
    page = with_connection(
        args, lambda connection: list_tasks(connection, wanted, limit=args.limit, after=after, characters=characters)
    )
    if args.json:
        write_lines(task_json(row, place) for row, place in zip_longest(page.rows, page.places))
    elif page.rows:
        write_lines(list_lines(page.rows, detect_screen(sys.stdout)))
    elif page.following is None:
        is_filtered = has_filters(args) or args.state or args.after
        note("no tasks match" if is_filtered else "no tasks")
    if page.following is not None and page.is_cut:
        where = f"among the {page.following.state} ones"
        note(f"read {SCAN_LIMIT:,} tasks and stopped {where}; to continue: --after {page.following}")
    elif page.following is not None:
        note(f"there are more: --after {page.following}")
    return 0


def list_lines(rows: Sequence[TaskRow], screen: Screen) -> Iterator[str]:
    """Yield the table; with the column `claims` if a task was claimed again before its claim had an outcome."""
    columns = (*COLUMNS, Column[TaskRow]("when", lambda row: _describe_time(row, screen)))
    is_suspect = any(row.claims > 1 for row in rows)
    return table_lines((*columns, CLAIMS) if is_suspect else columns, rows, screen, text=ERROR)
