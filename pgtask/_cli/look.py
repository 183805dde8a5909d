"""The commands that look: `list`, `show`, `stats` and `graph`. They change nothing.

Invariant: stdout carries what was asked for, complete at the time it is written; notes about it go to stderr.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any
from uuid import UUID

from pgtask._cli.arguments import SOME_FAILED
from pgtask._cli.database import load_configured_app, say, with_connection
from pgtask._cli.graph import mermaid
from pgtask._cli.report import report_json, report_lines
from pgtask._cli.rows import list_lines, row_json, show_lines
from pgtask._cli.tables import screen_of
from pgtask._postgres.listing import SCAN_LIMIT, STATES, Cursor, TaskFilter, list_tasks
from pgtask._postgres.statistics import gather_statistics
from pgtask._postgres.tasks import TaskRow, find_ids, show_tasks
from pgtask.errors import ConfigError

__all__ = ["graph_command", "list_command", "show_command", "stats_command", "task_filter"]

TABLE_CHARACTERS = 1024  # of a step and an error, for a table that shows the beginnings
SHORTEST_PREFIX = 8


def list_command(args: argparse.Namespace) -> int:
    wanted = task_filter(args, (args.state,) if args.state else STATES)
    after = None
    if args.after is not None:
        try:
            after = Cursor.parse(args.after)
        except ValueError:
            raise ConfigError(f"--after {args.after}: is not a cursor that `pgtask list` gave") from None
    characters = None if args.json else TABLE_CHARACTERS
    page = with_connection(
        args, lambda connection: list_tasks(connection, wanted, limit=args.limit, after=after, characters=characters)
    )
    if args.json:
        for row, place in zip(page.rows, page.places, strict=True):
            print(row_json(row, place))
    elif page.rows:
        for line in list_lines(page.rows, screen_of(sys.stdout)):
            print(line)
    elif page.following is None:
        say("no tasks")
    sys.stdout.flush()
    if page.following is not None and page.is_cut:
        where = f"among the {page.following.state} ones"
        say(f"looked at {SCAN_LIMIT:,} tasks and stopped {where}; to look on: --after {page.following}")
    elif page.following is not None:
        say(f"there are more: --after {page.following}")
    return 0


def task_filter(args: argparse.Namespace, states: tuple[str, ...]) -> TaskFilter:
    task, step = args.task, args.step
    if step is not None and "." in step:
        of, _, step = step.partition(".")
        if task not in (None, of):
            raise ConfigError(f"--task {task} has no step {args.step}")
        task = of
    return TaskFilter(states=states, queue=args.queue, task=task, step=step)


def show_command(args: argparse.Namespace) -> int:
    digits = args.id.replace("-", "").lower()
    try:
        if not SHORTEST_PREFIX <= len(digits) <= 32:
            raise ValueError
        first, last = UUID(digits.ljust(32, "0")), UUID(digits.ljust(32, "f"))
    except ValueError:
        raise ConfigError(f"{args.id} is not an id, nor the first {SHORTEST_PREFIX} or more digits of one") from None

    async def look(connection: Any) -> tuple[list[UUID], list[TaskRow]]:
        ids = await find_ids(connection, first, last, limit=4)
        return ids, await show_tasks(connection, ids[:1])

    ids, rows = with_connection(args, look)
    if len(ids) > 1:
        some = ", ".join(map(str, ids[:3])) + (", ..." if len(ids) > 3 else "")
        say(f"{args.id}: more than one task begins so: {some}")
        return SOME_FAILED
    if not rows:
        say(f"{args.id}: there is no such task: it is finished, was cancelled or never was")
        return SOME_FAILED
    lines = [row_json(rows[0])] if args.json else show_lines(rows[0], screen_of(sys.stdout))
    for line in lines:
        print(line)
    return 0


def stats_command(args: argparse.Namespace) -> int:
    report = with_connection(args, gather_statistics)
    for line in [report_json(report)] if args.json else report_lines(report, screen_of(sys.stdout)):
        print(line)
    return 0


def graph_command(args: argparse.Namespace) -> int:
    print(mermaid(load_configured_app(args.app)), end="")
    return 0
