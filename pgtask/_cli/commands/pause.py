"""`pgtask pause`: have no worker start tasks of a queue, a task, a step or a key; list what is paused."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from pgtask._cli.database import with_connection
from pgtask._cli.options import add_json
from pgtask._cli.output import json_line, write_lines
from pgtask._cli.parser import Parser
from pgtask._cli.quantities import relative_time
from pgtask._cli.tables import Column, Screen, detect_screen, table_lines
from pgtask._operator import operator_name
from pgtask._placement import scoped_key
from pgtask._postgres.pauses import Pause, Paused, pause, read_pauses
from pgtask.errors import ConfigError, EnqueueError
from pgtask.policy import check_queue

__all__ = ["HELP", "SUMMARY", "add_arguments", "add_paused", "paused_things", "run"]

SUMMARY = "start no tasks of a queue, task, step or key"
HELP = """\
Have no worker start tasks of these queues, tasks (workflows too) or steps, on any host. Steps that run end. Workers
obey within a second, also those that start later, until you resume them. Without a name, list what is paused.

--key pauses the one task that has this key, its next steps, and each later task with it; the others of --task go on.

    pgtask pause reports --reason "the provider is down"
    pgtask pause --task Crawl --step Order.Charge
    pgtask pause --task Crawl --key example.org
    pgtask pause
    pgtask resume reports
"""


def add_arguments(parser: Parser) -> None:
    parser.add_argument("queues", nargs="*", metavar="QUEUE", help="a queue")
    add_paused(parser)
    parser.add_argument("--reason", metavar="TEXT", help="why, for others who look")
    add_json(parser)


def add_paused(parser: Parser) -> None:
    """Add the options that `paused_things` reads."""
    parser.add_argument("-q", "--queue", action="append", default=[], metavar="NAME", help="a queue")
    parser.add_argument("--task", action="append", default=[], metavar="TASK", help="a task or workflow, as Greeter")
    parser.add_argument("--step", action="append", default=[], metavar="STEP", help="a step, as Greeter.ReadName")
    parser.add_argument("--key", action="append", default=[], metavar="KEY", help="a key of --task, not all of that")


def paused_things(args: argparse.Namespace, queues: Sequence[str]) -> list[Paused]:
    """Return what the arguments name, beside some queues. Raises `ConfigError`."""
    try:
        things = [Paused("queue", check_queue(name)) for name in (*queues, *args.queue)]
    except ValueError as error:
        raise ConfigError(str(error)) from None
    things += _paused_keys(args)
    for name in () if args.key else args.task:
        if not name or "." in name:
            raise ConfigError(f"--task {name} is no name of a task; for a step: --step Task.Step")
        things.append(Paused("task", name))
    for name in args.step:
        task, _, step = name.partition(".")
        if not (task and step):  # that of Django has a path
            raise ConfigError(f"--step {name} must be the name of a task and its step, as Greeter.ReadName")
        things.append(Paused("step", name))
    return list(dict.fromkeys(things))


def _paused_keys(args: argparse.Namespace) -> list[Paused]:
    if args.key and len(args.task) != 1:
        raise ConfigError(f"--key {args.key[0]}: a key belongs to a task or workflow; name this one by --task")
    try:
        return [Paused("key", scoped_key(args.task[0], key)) for key in args.key]
    except EnqueueError as error:
        raise ConfigError(f"--{error}") from None


def run(args: argparse.Namespace) -> int:
    things = paused_things(args, args.queues)
    if not things and args.reason is not None:
        raise ConfigError("--reason is of a new pause: name a queue, a --task, a --step or a --key")

    async def pause_and_read(connection: Any) -> tuple[set[Paused], list[Pause]]:
        new = await pause(connection, things, args.reason, operator_name()) if things else set()
        return new, await read_pauses(connection)

    new, pauses = with_connection(args, pause_and_read)
    if args.json:
        shown = [one for one in pauses if not things or one.paused in things]
        write_lines([json_line(msgspec.structs.asdict(one)) for one in shown])
    elif things:
        before = {one.paused: one for one in pauses}
        write_lines(f"{thing} {'is paused' if thing in new else _was_paused(before, thing)}" for thing in things)
    else:
        write_lines(_table(pauses, detect_screen(sys.stdout)))
    return 0


def _was_paused(before: dict[Paused, Pause], thing: Paused) -> str:
    if (one := before.get(thing)) is None:
        return "is paused"
    return f"was paused {relative_time(one.paused_at, one.seen_at)} by {one.paused_by}"


def _table(pauses: Sequence[Pause], screen: Screen) -> Iterator[str]:
    if not pauses:
        yield "nothing is paused"
        return
    columns = (
        Column[Pause]("paused", lambda one: str(one.paused), is_name=True),
        Column[Pause]("since", lambda one: relative_time(one.paused_at, one.seen_at), is_number=True),
        Column[Pause]("by", lambda one: one.paused_by, rank=1),
        Column[Pause]("reason", lambda one: one.reason or "-", rank=2),
    )
    yield from table_lines(columns, pauses, screen)
