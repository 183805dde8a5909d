"""`pgtask schedules`: list what starts when; pause, resume and start a schedule."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import msgspec

from pgtask._cli.database import with_connection
from pgtask._cli.options import add_json
from pgtask._cli.output import json_line, note, note_failures, write_lines
from pgtask._cli.parser import Parser
from pgtask._cli.quantities import relative_time
from pgtask._cli.tables import Column, detect_screen, table_lines
from pgtask._nearest import did_you_mean
from pgtask._operator import operator_name
from pgtask._postgres.schedules import (
    ScheduleRow,
    pause_schedules,
    read_schedules,
    resume_schedules,
    run_schedule,
)
from pgtask.errors import ConfigError

__all__ = ["HELP", "SUMMARY", "add_arguments", "run"]

SUMMARY = "list what starts when, pause or start it"
HELP = """\
List the schedules: the next time, the last occurrence and what has become of its task, and the state. One is `late` if
its time has passed and no worker of its app has looked; `removed` if its app does not declare it any more; `failed` if
it cannot be started, for the reason that --json tells.

While a schedule is paused, its occurrences are left out. When it is resumed, it goes on with the next one. To resume a
removed one starts it again, until a worker of an app without it starts. To run one starts its task now, out of turn,
also while it is paused.

    pgtask schedules
    pgtask schedules pause nightly
    pgtask schedules resume nightly
    pgtask schedules run nightly
"""

ACTIONS = ("pause", "resume", "run")


def add_arguments(parser: Parser) -> None:
    parser.add_argument("action", nargs="?", choices=ACTIONS, metavar="pause|resume|run", help="what to do")
    parser.add_argument("names", nargs="*", metavar="NAME", help="a schedule")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    if args.action is None:
        return _list(args)
    if not args.names:
        raise ConfigError(f"name the schedules to {args.action} (see pgtask schedules)")
    names = list(dict.fromkeys(args.names))

    async def change(connection: Any) -> tuple[list[str], list[str]]:
        known = {one.name: one for one in await read_schedules(connection)}
        unknown = [name for name in names if name not in known]
        refusals = [f"there is no schedule {name}{did_you_mean(name, list(known))}" for name in unknown]
        found = [name for name in names if name in known]
        lines, refused = await _change(connection, args.action, found)
        return lines, [*refusals, *refused]

    lines, refusals = with_connection(args, change)
    write_lines(lines)
    return note_failures(refusals) if refusals else 0


async def _change(connection: Any, action: str, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Do it; return the lines that say so, and those about what there was nothing to do for."""
    by = operator_name()
    if action == "run":
        ids = {name: await run_schedule(connection, name, by) for name in names}
        refused = [f"schedule {name} is removed, or was started in this second" for name in names if ids[name] is None]
        return [f"schedule {name} is started: {id}" for name, id in ids.items() if id is not None], refused
    if action == "pause":
        changed = await pause_schedules(connection, names, by)
        done, before = "is paused", "was paused before"
    else:
        changed = await resume_schedules(connection, names, by)
        done, before = "goes on", "is not paused"
    return (
        [f"schedule {name} {done}" for name in names if name in changed],
        [f"schedule {name} {before}" for name in names if name not in changed],
    )


def _list(args: argparse.Namespace) -> int:
    found = with_connection(args, read_schedules)
    if args.json:
        write_lines(
            json_line(msgspec.structs.asdict(one) | {"state": one.shown_state, "lateness": one.lateness})
            for one in found
        )
    elif found:
        write_lines(table_lines(COLUMNS, found, detect_screen(sys.stdout)))
    else:
        note("no schedules")
    return 0


def _last(one: ScheduleRow) -> str:
    return "-" if one.last_at is None else f"{relative_time(one.last_at, one.seen_at)} {one.task or ''}".rstrip()


COLUMNS = (
    Column[ScheduleRow]("schedule", lambda one: one.name, is_name=True),
    Column[ScheduleRow](
        "next", lambda one: relative_time(one.next_at, one.seen_at) if one.removed_at is None else "-", is_number=True
    ),
    Column[ScheduleRow]("last", _last, rank=3),
    Column[ScheduleRow](
        "state", lambda one: one.shown_state, usual="on", colours={"late": "\x1b[33m", "failed": "\x1b[31m"}
    ),
    Column[ScheduleRow]("cron", lambda one: one.cron, rank=4),
    Column[ScheduleRow]("zone", lambda one: one.zone, usual="UTC", rank=2),
    Column[ScheduleRow]("queue", lambda one: one.queue, usual="default", rank=1, is_name=True),
)
