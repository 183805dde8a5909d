"""Changes of all tasks that filters choose, for `retry`, `cancel`, `move` and `reschedule`.

Invariants: a change of all tasks needs the word --all; a command that was stopped leaves whole portions, and says how
many tasks it has changed, as does its row in pg_task_actions.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from pgtask._cli.bulk_progress import BulkProgress
from pgtask._cli.change_tasks import change_tasks, count_tasks
from pgtask._cli.database import with_connection
from pgtask._cli.options import ID_HELP, add_filters, has_filters, parse_rate, task_filter, whole_number
from pgtask._cli.output import note, write_lines
from pgtask._cli.parser import Parser
from pgtask._operator import operator_name
from pgtask._postgres.actions import begin_action, note_action
from pgtask._postgres.listing import STATES, Cursor, TaskFilter, filter_words
from pgtask._postgres.task_changes import PORTION, Change, begin_bulk, change_portion, count_portion
from pgtask._status import ExitCode
from pgtask.errors import ConfigError, PgtaskError

__all__ = ["add_bulk", "bulk_usage", "change_named_or_chosen"]

COUNTED_AT_ONCE = 10_000
PACE = 0.2  # seconds of a portion of a paced change


def add_bulk(parser: Parser, *, queue_flags: Sequence[str] = ("-q", "--queue")) -> None:
    """Add the options that `change_named_or_chosen` reads."""
    parser.add_argument("ids", nargs="*", metavar="ID", help=ID_HELP)
    parser.add_argument("--parked", action="store_true", help="only parked tasks")
    parser.add_argument("--state", type=str.lower, choices=STATES, help="only tasks in this state")
    add_filters(parser, queue_flags=queue_flags)
    parser.add_argument("--all", action="store_true", help="all tasks, without a filter")
    parser.add_argument("-n", "--limit", type=whole_number(1), metavar="N", help="by filters: no more than N")
    parser.add_argument("--dry-run", action="store_true", help="by filters: say how many, and change nothing")
    parser.add_argument("--rate", type=parse_rate, metavar="RATE", help="by filters: no faster, as 500/s or 30/m")


def bulk_usage(command: str, options: str = "", queue: str = "-q NAMES") -> str:
    """Return the usage of a command that has `add_bulk`."""
    indent = " " * 16
    options = options and f" {options}"
    return (
        f"pgtask {command}{options} ID...\n"
        f"       pgtask {command}{options}\n"
        f"{indent}[--parked] [{queue}]\n"
        f"{indent}[--task TASK] [--step STEP] [--key KEY]\n"
        f"{indent}[--error PATTERN] [--age TIME]\n"
        f"{indent}[--where FIELD=TEXT] [--group NAME]\n"
        f"{indent}[--all] [-n N]\n"
        f"{indent}[--dry-run] [--rate RATE]"
    )


def change_named_or_chosen(
    args: argparse.Namespace, change: Change, done: str, *, states: tuple[str, ...] = STATES
) -> int:
    """Change the tasks with `args.ids`, or those that the filters choose among the `states`; return the exit code."""
    is_chosen = has_filters(args) or args.parked or args.state is not None
    if args.ids and (is_chosen or args.all or args.dry_run or args.rate is not None or args.limit is not None):
        raise ConfigError(f"give either IDs or filters, not both (see pgtask {args.command} --help)")
    if args.ids:
        return change_tasks(args, change, done)
    if args.all and is_chosen:
        raise ConfigError("--all is for a command without filters: leave one out")
    if not (args.all or is_chosen):
        raise ConfigError(f"give IDs, a filter such as --task, or --all (see pgtask {args.command} --help)")
    if args.parked and args.state not in (None, "parked"):
        raise ConfigError(f"--parked and --state {args.state} exclude each other")
    state = "parked" if args.parked else args.state
    wanted = task_filter(args, states if state is None else (state,))
    if args.dry_run:
        number = with_connection(args, lambda connection: _count(connection, wanted, change, args.limit))
        write_lines([f"{count_tasks(number)} would be {done}"])
        return 0
    bulk = _BulkChange(args, wanted, done)
    with_connection(args, lambda connection: bulk.run(connection, change))
    write_lines([f"{count_tasks(bulk.tasks)} {done}"])
    if not bulk.is_stopped:
        return 0
    note("stopped: the other tasks are as they were; to go on, give the same command again")
    return ExitCode.INTERRUPTED


async def _count(
    connection: Any, wanted: TaskFilter, change: Change, limit: int | None, stop: asyncio.Event | None = None
) -> int:
    """Count the tasks that the change would change, until `stop` is set."""
    wanted, fixed = await begin_bulk(connection, wanted, change)
    total = 0
    after: Cursor | None = None
    while not (stop is not None and stop.is_set()) and (limit is None or total < limit):
        counted, after = await count_portion(connection, wanted, fixed, limit=COUNTED_AT_ONCE, after=after)
        total += counted
        if after is None:
            break
    return total if limit is None else min(total, limit)


class _BulkChange:
    """A change that goes on portion by portion, until all is done or Ctrl-C is pressed."""

    def __init__(self, args: argparse.Namespace, wanted: TaskFilter, done: str) -> None:
        self._wanted = wanted
        self._limit: int | None = args.limit
        self._rate: float | None = args.rate
        self._done = done
        self._filter = _chosen_by(args, wanted)
        self._stop = asyncio.Event()
        self.tasks = 0

    @property
    def is_stopped(self) -> bool:
        return self._stop.is_set()

    async def run(self, connection: Any, change: Change) -> None:
        with _stopped_by_interrupt(self._stop):
            total = None
            if sys.stderr.isatty():
                total = await _count(connection, self._wanted, change, self._limit, self._stop)
            number = await begin_action(connection, operator_name(), change.action, self._filter)
            progress = BulkProgress(total, self._done)
            try:
                self._wanted, change = await begin_bulk(connection, self._wanted, change)
                await self._change_portions(connection, change, number, progress)
            except BaseException:
                with contextlib.suppress(PgtaskError, OSError):
                    await note_action(connection, number, self.tasks, "failed")
                raise
            finally:
                progress.erase()
            await note_action(connection, number, self.tasks, "stopped" if self.is_stopped else "done")

    async def _change_portions(self, connection: Any, change: Change, number: int, progress: BulkProgress) -> None:
        portion = PORTION if self._rate is None else max(1, min(PORTION, int(self._rate * PACE)))
        begun_at = time.monotonic()
        after: Cursor | None = None
        while not self.is_stopped and (self._limit is None or self.tasks < self._limit):
            limit = portion if self._limit is None else min(portion, self._limit - self.tasks)
            changed, after = await change_portion(connection, self._wanted, change, limit=limit, after=after)
            self.tasks += changed
            if after is None:
                break
            await note_action(connection, number, self.tasks, "running")
            progress.show(self.tasks)
            if self._rate is not None:
                await self._wait(begun_at + self.tasks / self._rate - time.monotonic())

    async def _wait(self, seconds: float) -> None:
        """Wait, but not when the change is to stop."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(seconds, 0)):
                await self._stop.wait()


@contextlib.contextmanager
def _stopped_by_interrupt(stop: asyncio.Event) -> Iterator[None]:
    """Let the first Ctrl-C set the event; a second one is as usual."""
    loop = asyncio.get_running_loop()

    def interrupt() -> None:
        stop.set()
        loop.remove_signal_handler(signal.SIGINT)

    try:
        loop.add_signal_handler(signal.SIGINT, interrupt)
    except (RuntimeError, ValueError, NotImplementedError):  # not the main thread
        yield
        return
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)


def _chosen_by(args: argparse.Namespace, wanted: TaskFilter) -> str:
    """Return what the command has chosen by, as words of a shell."""
    words = ["--parked"] if args.parked else []
    words += ["--state", args.state] if args.state is not None else []
    words += ["--all"] if args.all else []
    words += filter_words(wanted, queue_flag="--from" if args.command == "move" else "--queue")
    words += ["--limit", str(args.limit)] if args.limit is not None else []
    words += ["--rate", f"{args.rate:.12g}/s"] if args.rate is not None else []
    return shlex.join(words)
