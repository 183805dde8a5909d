"""`pgtask top`: what happens now, by queue, step and worker."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import time
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import msgspec

from pgtask._cli.database import Database, find_database, with_connection
from pgtask._cli.from_option import add_from, addresses_of
from pgtask._cli.options import add_json, parse_seconds
from pgtask._cli.output import json_line, write_lines
from pgtask._cli.parser import Parser
from pgtask._cli.top_keys import press
from pgtask._cli.top_lines import TopView, plain_lines, screen_lines
from pgtask._cli.top_terminal import TopTerminal, open_terminal
from pgtask._observe.looks import FleetLooks
from pgtask._observe.top import TopFrame

__all__ = ["HELP", "SUMMARY", "add_arguments", "run"]

SUMMARY = "watch queues, steps and workers live"
HELP = """\
Show what happens now, and again each second: queues, steps and workers, and the tasks that were leased longest ago. The
database knows the queues and leases of the whole fleet. Rates, durations and waits of steps, and CPU and memory of
workers, come from the supervisors on this host that your user has started with --metrics, and from those of other hosts
whose --metrics port you give.

    pgtask top --from http://a:9464 --from http://b:9464

Keys: 1 queues, 2 steps, 3 workers, s sort, f filter, p pause, ? help, q quit.
"""

MIN_INTERVAL, MAX_INTERVAL = 0.2, 3600.0


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--once", action="store_true", help="print one look, after one interval, and exit")
    add_json(parser)
    add_from(parser)
    parser.add_argument(
        "--interval", type=_interval, default=1.0, metavar="TIME", help="the time between two looks (default: 1)"
    )


def _interval(text: str) -> float:
    seconds = parse_seconds(text)
    if not MIN_INTERVAL <= seconds <= MAX_INTERVAL:
        raise argparse.ArgumentTypeError(f"{text} is not from {MIN_INTERVAL:g} s to 1 h")
    return seconds


def run(args: argparse.Namespace) -> int:
    database = find_database(vars(args))
    addresses_of(args)
    with_connection(args, _leave)  # raises what is wrong with the database or its schema
    with _without_log():
        if args.once or args.json:
            asyncio.run(_write_frames(database, args))
        else:
            with open_terminal() as terminal:
                asyncio.run(_TopScreen(terminal, database, args).show())
    return 0


async def _leave(_: Any) -> None:
    """Leave the connection unused."""


@contextmanager
def _without_log() -> Iterator[None]:
    """Write no line of the log over the screen: it shows itself whether the database answers."""
    nowhere = logging.NullHandler()
    logging.getLogger("pgtask").addHandler(nowhere)
    try:
        yield
    finally:
        logging.getLogger("pgtask").removeHandler(nowhere)


def _open_looks(database: Database, args: argparse.Namespace) -> aclosing[FleetLooks]:
    return aclosing(FleetLooks(database.dsn, pooled=database.is_pooled, addresses=addresses_of(args)))


async def _write_frames(database: Database, args: argparse.Namespace) -> None:
    async with _open_looks(database, args) as looks:
        await looks.look()
        while True:
            await asyncio.sleep(args.interval)
            frame = await looks.look()
            write_lines([json_line(msgspec.to_builtins(frame))] if args.json else plain_lines(frame))
            if args.once:
                return


class _TopScreen:
    """The live view: looks each interval, and draws after each look and each key."""

    def __init__(self, terminal: TopTerminal, database: Database, args: argparse.Namespace) -> None:
        self._terminal = terminal
        self._database = database
        self._args = args
        self._view = TopView()
        self._frame: TopFrame | None = None
        self._ended = asyncio.Event()

    async def show(self) -> None:
        """Show it until a key or a signal ends it."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            loop.add_signal_handler(number, self._ended.set)
        self._terminal.listen(self._press, self._draw)
        async with _open_looks(self._database, self._args) as looks:
            looking = asyncio.create_task(self._look_again(looks))
            ended = asyncio.create_task(self._ended.wait())
            await asyncio.wait((looking, ended), return_when=asyncio.FIRST_COMPLETED)
            for task in (looking, ended):
                task.cancel()
            await asyncio.gather(ended, return_exceptions=True)
            if not self._ended.is_set():
                looking.result()  # raises what has ended it

    async def _look_again(self, looks: FleetLooks) -> None:
        while True:
            next_at = time.monotonic() + self._args.interval
            frame = await looks.look()
            if not self._view.is_paused or self._frame is None:
                self._frame = frame
                self._draw()
            await asyncio.sleep(max(0.0, next_at - time.monotonic()))

    def _press(self, key: str) -> None:
        view = press(self._view, key)
        if view is None:
            self._ended.set()
        elif view is not self._view:
            self._view = view
            self._draw()

    def _draw(self) -> None:
        if self._frame is not None:
            self._terminal.draw(screen_lines(self._frame, self._view, *self._terminal.size))
