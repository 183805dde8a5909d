"""The commands that look: `list`, `show`, `stats` and `graph`. They change nothing.

Invariant: stdout carries what was asked for, complete at the time it is written; notes about it go to stderr.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any
from uuid import UUID

from pgtask._cli.arguments import SOME_FAILED
from pgtask._cli.database import load_configured_app, with_connection
from pgtask._cli.graph import mermaid
from pgtask._cli.names import NO_SUCH_TASK, TaskName
from pgtask._cli.output import say, show
from pgtask._cli.report import report_json, report_lines
from pgtask._cli.rows import list_lines, row_json, show_lines
from pgtask._cli.tables import screen_of
from pgtask._postgres.listing import SCAN_LIMIT, STATES, Cursor, TaskFilter, list_tasks
from pgtask._postgres.statistics import gather_statistics
from pgtask._postgres.tasks import TaskRow, show_tasks
from pgtask.errors import ConfigError

__all__ = ["graph_command", "list_command", "show_command", "stats_command", "task_filter"]

TABLE_CHARACTERS = 1024  # of a step and an error, for a table that shows the beginnings


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
        show(row_json(row, place) for row, place in zip(page.rows, page.places, strict=True))
    elif page.rows:
        show(list_lines(page.rows, screen_of(sys.stdout)))
    elif page.following is None:
        is_filtered = any((args.state, args.queue, args.task, args.step, args.after))
        say("no tasks match" if is_filtered else "no tasks")
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
    name = TaskName.parse(args.id)

    async def look(connection: Any) -> TaskRow | str:
        found = await name.find(connection)
        if not isinstance(found, UUID):
            return found
        rows = await show_tasks(connection, [found])
        return rows[0] if rows else NO_SUCH_TASK

    row = with_connection(args, look)
    if isinstance(row, str):
        say(f"{name.text}: {row}")
        return SOME_FAILED
    show([row_json(row)] if args.json else show_lines(row, screen_of(sys.stdout)))
    return 0


def stats_command(args: argparse.Namespace) -> int:
    report = with_connection(args, gather_statistics)
    show([report_json(report)] if args.json else report_lines(report, screen_of(sys.stdout)))
    return 0


def graph_command(args: argparse.Namespace) -> int:
    show([mermaid(load_configured_app(args.app))], end="")
    return 0
