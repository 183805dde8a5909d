"""`pgtask run`: everything about a run, with its checkpoints."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

import msgspec

from pgtask._cli.database import with_connection
from pgtask._cli.names import NO_SUCH_RUN, Name
from pgtask._cli.options import ID_HELP, add_json
from pgtask._cli.output import json_line, note_failures, write_lines
from pgtask._cli.parser import Parser
from pgtask._cli.quantities import format_elapsed, format_time, relative_time
from pgtask._cli.run_rows import RUN_COLOURS, raw_json, run_fields
from pgtask._cli.tables import Column, Screen, detect_screen, labelled_lines, one_line, printable, table_lines
from pgtask._postgres.runs import CheckpointRow, RunStatus, read_checkpoints, read_statuses

__all__ = ["HELP", "SUMMARY", "add_arguments", "checkpoint_lines", "page_lines", "run"]

SUMMARY = "show everything about a run"
HELP = "Show everything about a run: its state, what it waits for, and its checkpoints, step by step."


def add_arguments(parser: Parser) -> None:
    parser.add_argument("id", metavar="ID", help=ID_HELP)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    name = Name.parse(args.id, is_run=True)

    async def read_run(connection: Any) -> tuple[RunStatus, list[CheckpointRow]] | list[str]:
        found = await name.resolve(connection)
        if isinstance(found, list):
            return found
        statuses = await read_statuses(connection, [found])
        return (statuses[0], await read_checkpoints(connection, found)) if statuses else [f"{name.text}: {NO_SUCH_RUN}"]

    read = with_connection(args, read_run)
    if isinstance(read, list):
        return note_failures(read)
    status, checkpoints = read
    if args.json:
        recorded = [raw_json(msgspec.structs.asdict(checkpoint)) for checkpoint in checkpoints]
        write_lines([json_line({**run_fields(status), "checkpoints": recorded})])
        return 0
    screen = detect_screen(sys.stdout)
    write_lines((*page_lines(status, screen), *checkpoint_lines(checkpoints, status.seen_at, screen)))
    return 0


def page_lines(run: RunStatus, screen: Screen) -> Iterator[str]:
    """Yield the page of a run, without its checkpoints."""
    now = run.seen_at
    values = {
        "id": str(run.id),
        "state": screen.paint(RUN_COLOURS.get(run.state, ""), run.state),
        "workflow": f"{run.name}, version {run.version}" if run.version else str(run.name),
        "parent": None if run.parent is None else str(run.parent),
        "waits on": run.waits_on,
        "due_at": None if run.due_at is None else format_time(run.due_at, now),
        "tried": str(run.tried) if run.tried else None,
        "signals": _describe_signals(run),
        "created_at": format_time(run.created_at, now),
        "started_at": None if run.started_at is None else format_time(run.started_at, now),
        "ended_at": None if run.ended_at is None else format_time(run.ended_at, now),
        "input": run.step if run.input is None else run.input,
        "output": run.output,
    }
    for label, value in values.items():
        if value is not None:
            yield from labelled_lines(label, value if label == "state" else printable(value), screen)
    if run.error is not None:
        yield ""
        yield screen.paint(RUN_COLOURS["ERROR"], "error")
        yield from (f"  {printable(line)}" for line in run.error.splitlines())


def _describe_signals(run: RunStatus) -> str | None:
    """Return the signals that the run has not taken; of an ended run, that it never will."""
    if not run.unread_signals:
        return None
    names = ", ".join(f"{count} {name}" for name, count in run.unread_signals.items())
    return f"{names}, not taken{' before it ended' if run.state in ('SUCCESS', 'CANCELLED') else ''}"


def checkpoint_lines(checkpoints: Sequence[CheckpointRow], now: datetime, screen: Screen) -> Iterator[str]:
    """Yield a blank line and the table of checkpoints, if there are any."""
    if not checkpoints:
        return
    columns: tuple[Column[CheckpointRow], ...] = (
        Column("#", lambda row: str(row.number), is_number=True),
        Column("place", lambda row: row.place, rank=1, is_name=True),
        Column("kind", lambda row: row.kind),
        Column("name", lambda row: row.name, is_name=True),
        Column("took", lambda row: format_elapsed(row.seconds) if row.kind == "step" else "-", rank=3),
        Column("recorded", lambda row: relative_time(row.recorded_at, now), rank=2),
    )
    yield ""
    yield from table_lines(columns, checkpoints, screen, text=Column("result", lambda row: _describe_result(row, now)))


def _describe_result(row: CheckpointRow, now: datetime) -> str:
    """Return the result of a checkpoint, or the time at which it is due."""
    due = "" if row.due_at is None else format_time(row.due_at, now)
    if row.kind == "step" and due and row.result is None:
        return f"try {row.tried + 1} at {due}, after {one_line(row.error or '')}"
    return one_line(row.error or row.result or (f"until {due}" if due else ""))
