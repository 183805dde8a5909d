"""`pgtask show`: everything about a task."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import msgspec

from pgtask._cli.database import with_connection
from pgtask._cli.names import NO_SUCH_TASK, Name
from pgtask._cli.options import ID_HELP, add_json
from pgtask._cli.output import note_failures, write_lines
from pgtask._cli.parser import Parser
from pgtask._cli.quantities import format_time, relative_time
from pgtask._cli.tables import Screen, detect_screen, labelled_lines, printable
from pgtask._cli.task_rows import STATE_COLOURS, task_json
from pgtask._postgres.runs import read_statuses
from pgtask._postgres.task_status import step_label
from pgtask._postgres.tasks import TaskRow, show_tasks

__all__ = ["HELP", "SUMMARY", "add_arguments", "run", "show_lines"]

SUMMARY = "show everything about a task"
HELP = "Show everything about a task: every column, the step, and the whole error."


def add_arguments(parser: Parser) -> None:
    parser.add_argument("id", metavar="ID", help=ID_HELP)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    name = Name.parse(args.id)

    async def read_task(connection: Any) -> TaskRow | list[str]:
        found = await name.resolve(connection)
        if not isinstance(found, UUID):
            return found
        rows = await show_tasks(connection, [found])
        if rows:
            return rows[0]
        is_run = bool(await read_statuses(connection, [found]))
        return [f"{name.text}: {f'it is a run that has ended: pgtask run {found}' if is_run else NO_SUCH_TASK}"]

    row = with_connection(args, read_task)
    if isinstance(row, list):
        return note_failures(row)
    write_lines([task_json(row)] if args.json else show_lines(row, detect_screen(sys.stdout)))
    return 0


def show_lines(row: TaskRow, screen: Screen) -> Iterator[str]:
    """Yield the page of a task."""
    now = row.seen_at
    values = {
        "id": str(row.id),
        "state": screen.paint(STATE_COLOURS.get(row.state, ""), row.state),
        "step": printable(step_label(row.step)),
        "queue": printable(row.queue),
        "priority": str(row.priority),
        "key": "-" if row.key is None else printable(row.key),
        "tried": str(row.tried),
        "claims": str(row.claims),
        "wakeup_at": format_time(row.wakeup_at, now, "parked" if row.state == "parked" else ""),
        "created_at": format_time(row.created_at, now),
        "updated_at": format_time(row.updated_at, now),
        "lease": _describe_lease(row),
    }
    if row.behind is not None:
        values["behind"] = _describe_behind(row)
    if row.limit_key is not None and row.limit_at is not None:
        values["limit"] = f"{printable(row.limit_key.rstrip())}, due {format_time(row.limit_at, row.seen_at)}"
    if row.progress is not None:
        values["progress"] = str(row.progress)
    for label, value in values.items():
        yield from labelled_lines(label, value, screen)
    yield ""
    yield from (printable(line) for line in _indent_json(row.step).split("\n"))
    if row.error is not None:
        yield ""
        yield screen.paint(STATE_COLOURS["parked"], "error")
        yield from (f"  {printable(line)}" for line in row.error.splitlines())


def _describe_behind(row: TaskRow) -> str:
    assert row.behind is not None
    due = format_time(row.behind, row.seen_at)
    if row.behind_id is None:
        return f"the task that had its key has just gone: a worker makes this one due, {due}"
    return f"{row.behind_id}, which has its key; when that has left the table, this one is due: {due}"


def _describe_lease(row: TaskRow) -> str:
    if row.locked_by is None or row.lock_expires_at is None:
        return "-"
    distance = relative_time(row.lock_expires_at, row.seen_at)
    if row.lock_expires_at < row.seen_at:
        return f"{row.locked_by}, expired {distance}: any worker may take the task"
    return f"{row.locked_by}, ends {distance} unless it is renewed"


def _indent_json(step: str) -> str:
    try:
        return msgspec.json.format(step, indent=2)
    except (msgspec.DecodeError, RecursionError):
        return step
