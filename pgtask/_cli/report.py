"""How the statistics look: the report of `stats`, for people and as JSON.

Invariant: a number that was not counted to its end says so: `100,000+`, or its name in `at_least`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from pgtask._cli.tables import Column, Screen, printable, relative, size, table_lines
from pgtask._postgres.statistics import LaneCount, Report, Transaction

__all__ = ["report_json", "report_lines"]

LONG_TRANSACTION = 60.0
"""Seconds after which an open transaction is worth a warning: dead rows pile up behind it at the speed of the queue."""

_COUNTS = ("ready", "scheduled", "leased", "parked")
_COLUMNS = (
    Column("queue"),
    Column("prio", is_number=True),
    *(Column(name, is_number=True) for name in _COUNTS),
    Column("oldest due", is_number=True),
    Column("next due", is_number=True),
)
_WARNING = "\x1b[33m"


def report_lines(report: Report, screen: Screen) -> Iterator[str]:
    if report.lanes:
        yield from table_lines(_COLUMNS, [_cells(lane, report) for lane in report.lanes], screen)
    else:
        yield "no tasks"
    yield ""
    rows = "not estimated yet" if report.rows is None else f"about {report.rows:,} rows"
    yield f"table   {rows}, {report.dead_rows:,} dead; {size(report.table_bytes)}, indexes {size(report.index_bytes)}"
    vacuumed = "never yet" if report.vacuumed_at is None else relative(report.vacuumed_at, report.seen_at)
    yield f"vacuum  {vacuumed}"
    for warning in _warnings(report):
        yield screen.paint(_WARNING, f"warning: {warning}")


def _cells(lane: LaneCount, report: Report) -> tuple[str, ...]:
    counts = (f"{getattr(lane, name):,}{'+' * (name in lane.at_least)}" for name in _COUNTS)
    times = ("-" if time is None else relative(time, report.seen_at) for time in (lane.oldest_due, lane.next_due))
    return (lane.queue, str(lane.priority), *counts, *times)


def _warnings(report: Report) -> Iterator[str]:
    expired = sum(lane.expired_leases for lane in report.lanes)
    if expired:
        leases = "1 lease has" if expired == 1 else f"{expired:,} leases have"
        yield f"{leases} run out and no worker has taken over: is one running?"
    holder = report.oldest_transaction
    if holder is not None and _age(holder, report) >= LONG_TRANSACTION:
        who = (
            f"{holder.name}, {holder.state}"
            if holder.pid is None
            else f"pid {holder.pid} ({holder.name}, {holder.state})"
        )
        since = relative(holder.began_at, report.seen_at).removesuffix(" ago")
        yield printable(f"{who}: a transaction open for {since}; dead rows stay until it ends, and claims slow down")


def _age(holder: Transaction, report: Report) -> float:
    return (report.seen_at - holder.began_at).total_seconds()


def report_json(report: Report) -> str:
    fields: dict[str, Any] = msgspec.structs.asdict(report)
    if report.oldest_transaction is not None:
        seconds = round(_age(report.oldest_transaction, report), 3)
        fields["oldest_transaction"] = {**msgspec.structs.asdict(report.oldest_transaction), "seconds": seconds}
    return msgspec.json.encode(fields).decode()
