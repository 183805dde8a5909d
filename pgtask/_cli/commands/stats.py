"""`pgtask stats`: counts of tasks, the size of the table, and a warning for each problem.

Invariant: a number that was not counted to its end says so: `100,000+`, or its name in `at_least`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import msgspec

from pgtask._cli.database import with_connection
from pgtask._cli.options import add_json
from pgtask._cli.output import json_line, write_lines
from pgtask._cli.quantities import format_size, relative_time
from pgtask._cli.tables import Column, Screen, detect_screen, printable, table_lines, wrap_sentence
from pgtask._postgres.statistics import LaneCount, OpenTransaction, Statistics, gather_statistics

__all__ = ["HELP", "SUMMARY", "add_arguments", "report_lines", "run"]

SUMMARY = "show counts, table size and problems"
HELP = """\
Count the tasks of each queue and priority by their state. No count goes further than 100,000 (less with more than ten
lanes): 100,000+ means at least that many. Then the size of the table, and a warning for each problem: expired
leases, an old transaction that keeps vacuum from removing dead rows.
"""

LONG_TRANSACTION = 60.0
"""Seconds after which an open transaction deserves a warning: dead rows pile up behind it at the speed of the queue."""

_WARNING = "\x1b[33m"

add_arguments = add_json


def run(args: argparse.Namespace) -> int:
    report = with_connection(args, gather_statistics)
    write_lines([_report_json(report)] if args.json else report_lines(report, detect_screen(sys.stdout)))
    return 0


def report_lines(report: Statistics, screen: Screen) -> Iterator[str]:
    """Yield the report for people."""
    if report.lanes:
        yield from table_lines(_lane_columns(report.seen_at), report.lanes, screen)
    else:
        yield "no tasks"
    yield ""
    rows = "not estimated yet" if report.rows is None else f"about {report.rows:,} rows as of the last vacuum"
    sizes = f"{format_size(report.table_bytes)}, indexes {format_size(report.index_bytes)}"
    yield from wrap_sentence(f"table   {rows}, {report.dead_rows:,} dead; {sizes}", screen, " " * 8)
    vacuumed = "never yet" if report.vacuumed_at is None else relative_time(report.vacuumed_at, report.seen_at)
    yield f"vacuum  {vacuumed}"
    for pause in report.pauses:
        since = relative_time(pause.paused_at, report.seen_at)
        reason = "" if pause.reason is None else f": {pause.reason}"
        line = printable(f"paused  {pause.paused}, {since}, by {pause.paused_by}{reason}")
        yield from wrap_sentence(line, screen, " " * 8)
    for warning in _find_problems(report):
        yield from (screen.paint(_WARNING, line) for line in wrap_sentence(f"warning: {warning}", screen, " " * 9))


def _lane_columns(now: datetime) -> tuple[Column[LaneCount], ...]:
    def count_column(name: str) -> Column[LaneCount]:
        return Column(name, lambda lane: f"{getattr(lane, name):,}{'+' * (name in lane.at_least)}", is_number=True)

    def show_time(time: datetime | None) -> str:
        return "-" if time is None else relative_time(time, now)

    return (
        Column("queue", lambda lane: lane.queue, is_name=True),
        Column("prio", lambda lane: str(lane.priority), is_number=True, usual="0", rank=3),
        *map(count_column, ("ready", "scheduled", "leased", "parked")),
        Column("oldest due", lambda lane: show_time(lane.oldest_due), is_number=True, rank=2),
        Column("next due", lambda lane: show_time(lane.next_due), is_number=True, rank=1),
    )


def _find_problems(report: Statistics) -> Iterator[str]:
    expired = sum(lane.expired_leases for lane in report.lanes)
    if expired:
        leases, tasks = ("1 lease has", "task") if expired == 1 else (f"{expired:,} leases have", "tasks")
        yield f"{leases} expired and no worker has claimed the {tasks}: is one running?"
    oldest = report.oldest_transaction
    if oldest is not None and _seconds_open(oldest, report) >= LONG_TRANSACTION:
        state = f"{oldest.name}, {oldest.state}"
        holder = state if oldest.pid is None else f"pid {oldest.pid} ({state})"
        since = relative_time(oldest.began_at, report.seen_at).removesuffix(" ago")
        yield printable(f"{holder}: a transaction open for {since}; dead rows stay until it ends, and claims slow down")


def _seconds_open(transaction: OpenTransaction, report: Statistics) -> float:
    return (report.seen_at - transaction.began_at).total_seconds()


def _report_json(report: Statistics) -> str:
    fields: dict[str, Any] = msgspec.structs.asdict(report)
    oldest = report.oldest_transaction
    if oldest is not None:
        seconds = round(_seconds_open(oldest, report), 3)
        fields["oldest_transaction"] = {**msgspec.structs.asdict(oldest), "seconds": seconds}
    fields["pauses"] = [msgspec.structs.asdict(pause) for pause in report.pauses]
    fields["lanes"] = [msgspec.structs.asdict(lane) for lane in report.lanes]
    return json_line(fields)
