"""`pgtask groups`: how far groups of tasks are; watch them; cancel them."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections import deque
from collections.abc import Sequence
from typing import Any

import msgspec

from pgtask._cli.database import with_connection
from pgtask._cli.options import add_json, add_page
from pgtask._cli.output import flush_streams, json_line, note, write_lines
from pgtask._cli.parser import Parser
from pgtask._cli.quantities import format_elapsed, relative_time
from pgtask._cli.tables import Column, Screen, detect_screen, table_lines
from pgtask._operator import operator_name
from pgtask._postgres.actions import begin_action, note_action
from pgtask._postgres.groups import cancel_group, end_named, read_rows
from pgtask.errors import ConfigError, GroupNotFound
from pgtask.groups import GroupStatus, measure, status_of

__all__ = ["HELP", "SUMMARY", "add_arguments", "run"]

SUMMARY = "show, watch and cancel groups of tasks"
HELP = """\
List groups of tasks, the latest first, or those that you name: how much of each is done, and when the rest will be, at
the rate since the start; --watch shows them until they have ended, at the rate of the last half minute. --cancel has no
worker start a member any more and removes those that wait. For members, use --group of list, parked, retry, cancel and
move.

    pgtask groups
    pgtask groups "crawl 2026-11-30" --watch
    pgtask parked --group "crawl 2026-11-30"
"""

WATCH_INTERVAL = 1.0  # seconds
_CLEAR = "\x1b[J"


def add_arguments(parser: Parser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help="a group")
    parser.add_argument("-w", "--watch", action="store_true", help="show them until they have ended, or Ctrl-C")
    parser.add_argument("--cancel", action="store_true", help="cancel the groups that you name")
    parser.add_argument("--no-then", action="store_true", help="with --cancel: do not enqueue the step at the end")
    add_page(parser, "groups")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    if args.cancel and not args.names:
        raise ConfigError("--cancel needs the name of a group")
    if args.no_then and not args.cancel:
        raise ConfigError("--no-then is for --cancel")
    try:
        with_connection(args, lambda connection: _show(connection, args))
    except KeyboardInterrupt:
        if not args.watch:
            raise
    return 0


async def _show(connection: Any, args: argparse.Namespace) -> None:
    if args.cancel:
        await _cancel(connection, args.names, then=not args.no_then)
    if args.watch:
        await _watch(connection, args)
        return
    groups = await _read(connection, args)
    if groups or args.json:
        _write(groups, args, detect_screen(sys.stdout))
    else:
        note("no groups")


async def _cancel(connection: Any, names: Sequence[str], *, then: bool) -> None:
    for name in names:
        number = await begin_action(connection, operator_name(), "cancel group", name)
        done = await cancel_group(connection, name, then)
        await note_action(connection, number, 0, "done" if done else "failed")
        if done is None:
            raise GroupNotFound(f"there is no group {name!r}: pgtask groups lists those there are")
        if not done:
            note(f"the group {name} has ended before")


async def _read(connection: Any, args: argparse.Namespace) -> list[GroupStatus]:
    rows = await read_rows(connection, args.names or None, args.limit)
    missing = set(args.names).difference(row[0] for row in rows)
    if missing:
        raise GroupNotFound(f"there is no group {min(missing)!r}: pgtask groups lists those there are")
    return [status_of(row) for row in rows]


async def _watch(connection: Any, args: argparse.Namespace) -> None:
    """Show the groups each second; on a terminal in one place, else those that have changed."""
    samples: dict[str, deque[GroupStatus]] = {}
    screen = detect_screen(sys.stdout)
    lines, before = 0, set[tuple[Any, ...]]()
    while True:
        groups = [measure(samples.setdefault(one.name, deque()), one) for one in await _read(connection, args)]
        if screen.width is not None and not args.json:
            sys.stdout.write(f"\x1b[{lines}F{_CLEAR}" if lines else "")
            lines = _write(groups, args, screen)
        else:
            changed = [one for one in groups if _counts(one) not in before]
            _write(changed, args, screen)
            before = set(map(_counts, groups))
        flush_streams()
        if all(one.has_ended for one in groups):
            return
        await asyncio.sleep(WATCH_INTERVAL)
        if over := [one.name for one in groups if not (one.left or one.has_ended)]:
            await end_named(connection, over)


def _counts(one: GroupStatus) -> tuple[Any, ...]:
    return one.name, one.state, one.total, one.done, one.parked, one.cancelled


def _write(groups: Sequence[GroupStatus], args: argparse.Namespace, screen: Screen) -> int:
    """Write groups; return the number of lines."""
    if args.json:
        lines = [json_line({**msgspec.structs.asdict(one), "left": one.left, "eta": _seconds(one)}) for one in groups]
    elif groups:
        lines = list(table_lines(COLUMNS, groups, screen, text=NAME))
    else:
        lines = []
    write_lines(lines)
    return len(lines)


def _seconds(one: GroupStatus) -> float | None:
    return None if one.eta is None else one.eta.total_seconds()


def _percent(one: GroupStatus) -> str:
    total = one.total - one.cancelled
    return f"{100 * one.done / total:.1f} %" if total else "100.0 %"


def _eta(one: GroupStatus) -> str:
    if one.has_ended or one.eta is None:
        return "" if one.has_ended else "?"
    return format_elapsed(round(one.eta.total_seconds()))


COLUMNS = (
    Column[GroupStatus]("%", _percent, is_number=True),
    Column[GroupStatus]("eta", _eta, is_number=True),
    Column[GroupStatus]("done", lambda one: f"{one.done:,}", is_number=True),
    Column[GroupStatus]("total", lambda one: f"{one.total:,}", is_number=True),
    Column[GroupStatus]("parked", lambda one: f"{one.parked:,}", usual="0", is_number=True),
    Column[GroupStatus]("cancelled", lambda one: f"{one.cancelled:,}", usual="0", is_number=True),
    Column[GroupStatus]("rate", lambda one: f"{one.rate:,.0f}/s", is_number=True, rank=1),
    Column[GroupStatus]("state", lambda one: one.state),
    Column[GroupStatus]("started", lambda one: relative_time(one.started_at, one.seen_at), is_number=True, rank=2),
)
NAME = Column[GroupStatus]("group", lambda one: one.name)
