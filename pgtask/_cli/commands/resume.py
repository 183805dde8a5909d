"""`pgtask resume`: resume failed or cancelled runs, wake paused ones, and end pauses of queues, tasks, steps, keys."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from pgtask._cli.commands.pause import add_paused, paused_things
from pgtask._cli.database import with_connection
from pgtask._cli.names import Name, resolve_names
from pgtask._cli.options import ID_HELP
from pgtask._cli.output import note_failures, write_lines
from pgtask._cli.parser import Parser
from pgtask._operator import operator_name
from pgtask._postgres.pauses import Paused, read_pauses, resume
from pgtask._postgres.runs import resume_runs
from pgtask.errors import ConfigError

__all__ = ["HELP", "SUMMARY", "add_arguments", "run"]

SUMMARY = "resume runs, and what is paused"
HELP = """\
Resume runs that failed (ERROR) or were cancelled, from their checkpoints, with all their retries; wake paused ones, to
check again what they wait for. A run that a worker is running, or that has succeeded, is named.

Let workers start tasks of queues, tasks, steps and keys again that pgtask pause has paused. A word is a queue if one
of this name is paused, else the id of a run.

    pgtask resume reports
    pgtask resume --task Crawl
    pgtask resume --task Crawl --key example.org
    pgtask resume --all
    pgtask resume 0198c1d2
"""

NOTHING_TO_RESUME = "it is being run, due, scheduled or has succeeded, or there is no such run"


def add_arguments(parser: Parser) -> None:
    parser.add_argument("words", nargs="*", metavar="QUEUE|ID", help=f"a paused queue; or of a run {ID_HELP}")
    add_paused(parser)
    parser.add_argument("--all", action="store_true", help="all that is paused")


def run(args: argparse.Namespace) -> int:
    named = paused_things(args, [])
    if args.all and (named or args.words):
        raise ConfigError("--all resumes all that is paused: leave the names out")
    if not (args.all or named or args.words):
        raise ConfigError("name a paused queue, --task or --step, or the id of a run (see pgtask resume --help)")

    async def resume_named(connection: Any) -> tuple[list[str], list[str]]:
        if args.all:
            return _report(await resume(connection, None, operator_name())) or ["nothing was paused"], []
        queues = {one.name for one in await read_pauses(connection) if one.kind == "queue"}
        things = named + [Paused("queue", word) for word in args.words if word in queues]
        ids = [word for word in args.words if word not in queues]
        names = [_parse(word) for word in ids]
        done = await resume(connection, things, operator_name())
        refusals = [f"{thing} is not paused" for thing in things if thing not in done]
        lines = _report(done)
        if names:
            resumed, refused = await _resume_runs(connection, names)
            lines.append(f"{resumed:,} run{'' if resumed == 1 else 's'} resumed")
            refusals += refused
        return lines, refusals

    lines, refusals = with_connection(args, resume_named)
    write_lines(lines)
    return note_failures(refusals) if refusals else 0


def _report(done: set[Paused]) -> list[str]:
    return [f"{thing} goes on" for thing in sorted(done)]


def _parse(word: str) -> Name:
    try:
        return Name.parse(word, is_run=True)
    except ConfigError as error:
        raise ConfigError(f"{error}; and no queue of this name is paused") from None


async def _resume_runs(connection: Any, names: Sequence[Name]) -> tuple[int, list[str]]:
    ids, refusals = await resolve_names(connection, names)
    runs = list(dict.fromkeys(ids))
    resumed, taken = await resume_runs(connection, runs)
    reasons = {one.run: str(one) for one in taken}
    left = (run for run in runs if run not in resumed)
    return len(resumed), [*(f"{run}: {reasons.get(run, NOTHING_TO_RESUME)}" for run in left), *refusals]
