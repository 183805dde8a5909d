"""`pgtask check`: the new code against all that waits, before a deploy."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from pgtask._check.causes import Cause
from pgtask._check.checker import CheckResult, check_dump, check_table, dump_table
from pgtask._check.dump import Header
from pgtask._cli.database import load_configured_app, with_connection
from pgtask._cli.options import add_json, add_traceback, parse_seconds, whole_number
from pgtask._cli.output import SOME_FAILED, json_line, note, write_lines
from pgtask._cli.parser import Parser
from pgtask._cli.tables import Screen, detect_screen, labelled_lines, one_line, printable
from pgtask._postgres.waiting import find_empty_queues
from pgtask.app import App
from pgtask.config import load_config
from pgtask.errors import ConfigError

__all__ = ["HELP", "SUMMARY", "add_arguments", "cause_lines", "run"]

SUMMARY = "tell what a deploy of new code would break"
HELP = """\
Read all tasks that wait, as the code of APP would, and change nothing: decode each step, also of future, parked and
leased tasks, and replay each open run of a workflow to the end of its record. No step runs. But the code of workflows
between the calls of ctx does.

It names what would break, folded by cause, with the number of tasks, an example and a remedy. The exit code is 0 if
nothing would break, and 1 otherwise. Tasks that are parked already for the same error do not count. A role with SELECT
alone will do, and so will a replica.

    pgtask check --dsn postgresql://replica/shop shop:app

Name all apps that share the table, or the queues of one: a task that no app has would wait without end.

--dump writes all that waits to a file, which has the data of your tasks; --from checks such a file, for a CI without
access to the database:

    pgtask check --dump shop.dump --dsn postgresql://db/shop
    pgtask check --from shop.dump shop:app
"""

REPLAY_SECONDS = 5.0


def add_arguments(parser: Parser) -> None:
    parser.add_argument("apps", nargs="*", metavar="APP", help="an app, as module:attribute (default: PGTASK_APP)")
    parser.add_argument(
        "-q", "--queue", action="append", dest="queues", metavar="NAME", help="only this queue; may be repeated"
    )
    parser.add_argument(
        "--max-step-bytes", type=whole_number(1), metavar="BYTES", help="as of the workers (default: their setting)"
    )
    parser.add_argument(
        "--replay-limit",
        type=parse_seconds,
        default=REPLAY_SECONDS,
        metavar="TIME",
        help="the most time for the replay of one run (default: 5 s)",
    )
    parser.add_argument(
        "--sample", type=whole_number(1), metavar="N", help="only N tasks, chosen at random: quick, but not complete"
    )
    files = parser.add_mutually_exclusive_group()
    files.add_argument("--dump", type=Path, metavar="FILE", help="check nothing, but write all that waits to a file")
    files.add_argument("--from", type=Path, dest="dumped", metavar="FILE", help="check such a file, without a database")
    add_json(parser)
    add_traceback(parser)


def run(args: argparse.Namespace) -> int:
    if args.dump is not None:
        return _dump(args)
    with contextlib.redirect_stdout(sys.stderr):  # of what the code of the app prints
        result = _check(args)
    if args.json:
        write_lines(json_line(_fields(cause)) for cause in result.causes)
    elif result.causes:
        write_lines(cause_lines(result, detect_screen(sys.stdout)))
    note(_summary(result, args.sample))
    return SOME_FAILED if result.is_broken else 0


def _check(args: argparse.Namespace) -> CheckResult:
    apps = [load_configured_app(reference) for reference in args.apps or [None]]
    if args.dumped is not None:
        return _check_file(args, apps)
    max_bytes = args.max_step_bytes or load_config({}).max_step_bytes

    async def check(connection: Any) -> CheckResult:
        await _check_queues(connection, args.queues, {one.policy.queue for app in apps for one in app})
        return await check_table(
            *(connection, apps),
            max_bytes=max_bytes,
            seconds=args.replay_limit,
            queues=args.queues,
            sample=args.sample,
        )

    return with_connection(args, check)


def _check_file(args: argparse.Namespace, apps: Sequence[App]) -> CheckResult:
    for flag, value in (("--queue", args.queues), ("--sample", args.sample), ("--max-step-bytes", args.max_step_bytes)):
        if value is not None:
            raise ConfigError(f"{flag} is for the database: give it to the pgtask check --dump that writes the file")
    header, result = asyncio.run(check_dump(args.dumped, apps, seconds=args.replay_limit))
    args.sample = header.sample
    if header.queues is not None:
        note(f"the file has the tasks of the queues {', '.join(header.queues)} only")
    return result


def _dump(args: argparse.Namespace) -> int:
    if args.apps or args.json:
        raise ConfigError(f"--dump {args.dump} checks nothing: leave out {args.apps[0] if args.apps else '--json'}")
    max_bytes = args.max_step_bytes or load_config({}).max_step_bytes
    header = Header(max_bytes, args.queues, args.sample)

    async def dump(connection: Any) -> int:
        await _check_queues(connection, args.queues, None)
        try:
            return await dump_table(connection, args.dump, header)
        except OSError as error:
            raise ConfigError(f"--dump {args.dump}: {error.strerror}") from None

    note(f"{_count(with_connection(args, dump), 'task')} written to {args.dump}")
    return 0


async def _check_queues(connection: Any, queues: Sequence[str] | None, known: Collection[str] | None) -> None:
    """Refuse a queue that neither the table nor the code knows: its name is mistyped. Say which ones have no task."""
    for queue in await find_empty_queues(connection, queues) if queues else ():
        if known is not None and queue not in known:
            hint = f"; the queues of the code are {', '.join(sorted(known))}"
            raise ConfigError(
                f"--queue {queue}: the table has no task in it, and the code no step that waits there{hint}"
            )
        note(f"no task waits in the queue {queue}")


def _fields(cause: Cause) -> dict[str, Any]:
    return {name: getattr(cause, name) for name in cause.__struct_fields__}


def _summary(result: CheckResult, sample: int | None) -> str:
    at_random = "" if sample is None else ", chosen at random"
    checked = f"{_count(result.tasks, 'task')} checked{at_random}, {result.runs:,} of them runs"
    broken = sum(cause.count - cause.known for cause in result.causes)
    known = sum(cause.known for cause in result.causes)
    already = f"; {known:,} more are parked already for the same error" if known else ""
    return f"{checked}; {_count(broken, 'task') if broken else 'nothing'} would break{already}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def cause_lines(result: CheckResult, screen: Screen) -> Iterator[str]:
    """Yield the causes for people, a paragraph each."""
    for number, cause in enumerate(result.causes):
        if number:
            yield ""
        yield from labelled_lines("breaks" if cause.is_new else "broken", _describe_count(cause), screen)
        yield from labelled_lines("error", printable(one_line(cause.error)), screen)
        yield from labelled_lines("example", str(cause.example), screen)
        yield from labelled_lines("remedy", printable(cause.remedy), screen)


def _describe_count(cause: Cause) -> str:
    parked = f", {cause.parked:,} of them parked" if cause.parked else ""
    at = f" of {printable(cause.what)}" if cause.what else ""
    return f"{_count(cause.count, 'task')}{at}{parked}"
