"""`pgtask limit`: show the limits and their keys, and change them while workers run."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import msgspec

from pgtask._cli.database import with_connection
from pgtask._cli.options import add_json
from pgtask._cli.output import json_line, write_lines
from pgtask._cli.parser import Parser
from pgtask._cli.quantities import relative_time
from pgtask._cli.tables import Column, Screen, detect_screen, table_lines
from pgtask._durations import parse_duration
from pgtask._nearest import did_you_mean
from pgtask._operator import operator_name
from pgtask._postgres.limits import LimitChange, LimitKey, LimitRow, change_limit, read_keys, read_limits
from pgtask.errors import ConfigError, DefinitionError
from pgtask.limits import Rate

__all__ = ["HELP", "SUMMARY", "add_arguments", "run"]

SUMMARY = "show limits, and change them while workers run"
HELP = """\
Show the limits of steps, or one with its keys; or change one. All workers obey from their next claim on. A change
stays, also when the code is deployed again, until you take it back with --reset.

    pgtask limit
    pgtask limit host
    pgtask limit host --concurrency 4 --rate 200/s
    pgtask limit provider --cost 500000/min
    pgtask limit provider --pause 10m
    pgtask limit provider --reset
"""

COUNTED = 10_000
MAX_KEYS = 50
_RATE = re.compile(r"([0-9]+(?:\.[0-9]+)?|[0-9]*\.[0-9]+)\s*/\s*(.+)")


def add_arguments(parser: Parser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="a limit")
    parser.add_argument("--concurrency", metavar="N|none", help="how many steps of a key run at once; 0: none starts")
    parser.add_argument("--rate", metavar="N/TIME|none", help="how many steps of a key start: 200/s, 3000/min, 5/10s")
    parser.add_argument("--cost", metavar="N/TIME|none", help="how many units the steps of a key use: 500000/min")
    parser.add_argument("--burst", type=float, metavar="N", help="what an idle key saves up; with --rate or --cost")
    parser.add_argument("--pause", metavar="TIME", help="start none for so long: 30s, 10m")
    parser.add_argument("--resume", action="store_true", help="end the pause")
    parser.add_argument("--reset", action="store_true", help="take back what people have changed")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    change = _change(args)
    if change is not None and args.name is None:
        raise ConfigError("name the limit to change; pgtask limit lists them")

    async def change_and_read(connection: Any) -> tuple[list[LimitRow], list[LimitKey], list[str]]:
        known = [one.name for one in await read_limits(connection)]
        if args.name is None or args.name not in known:
            return ([], [], known) if args.name else (await read_limits(connection), [], known)
        if change is not None:
            await change_limit(connection, args.name, change, _words(args), operator_name())
        keys = [] if change is not None else await read_keys(connection, args.name, MAX_KEYS)
        return await read_limits(connection, args.name), keys, known

    limits, keys, known = with_connection(args, change_and_read)
    if args.name is not None and not limits:
        hint = did_you_mean(args.name, known) if known else "; workers write the limits of an app when they start"
        raise ConfigError(f"there is no limit {args.name}{hint}")
    if args.json:
        shown = [{**msgspec.structs.asdict(one), **({"keys": keys} if args.name else {})} for one in limits]
        write_lines([json_line(one) for one in shown])
    else:
        write_lines(_lines(limits, keys, detect_screen(sys.stdout)))
    return 0


def _change(args: argparse.Namespace) -> LimitChange | None:
    """Return what the arguments change, or None if they change nothing."""
    if args.pause is not None and args.resume:
        raise ConfigError("give either --pause or --resume")
    if args.burst is not None and (args.rate is None) == (args.cost is None):
        raise ConfigError("--burst goes with --rate or with --cost")
    given: dict[str, Any] = {}
    if args.concurrency is not None:
        given["concurrency"] = _count(args.concurrency)
    if args.rate is not None:
        given["rate"] = _rate("--rate", args.rate, args.burst)
    if args.cost is not None:
        given["cost"] = _rate("--cost", args.cost, args.burst)
    if args.resume:
        given["pause"] = None
    elif args.pause is not None:
        given["pause"] = _seconds("--pause", args.pause)
    return LimitChange(**given, resets=args.reset) if given or args.reset else None


def _count(text: str) -> int | None:
    if text == "none":
        return None
    if not text.isascii() or not text.isdigit() or int(text) > 1_000_000:
        raise ConfigError(f"--concurrency {text} must be a whole number, or none")
    return int(text)


def _rate(option: str, text: str, burst: float | None) -> Rate | None:
    if text == "none":
        return None
    if (found := _RATE.fullmatch(text.strip())) is None:
        raise ConfigError(f"{option} {text} must be a number and a time, as 200/s, 3000/min or 5/10s; or none")
    per = found[2] if found[2][0].isdigit() else f"1{found[2]}"
    of = "units" if option == "--cost" else None
    try:
        return Rate(float(found[1]), per=timedelta(seconds=_seconds(option, per)), burst=burst, of=of)
    except DefinitionError as error:
        raise ConfigError(f"{option} {text}: {error}") from None


def _seconds(option: str, text: str) -> float:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise ConfigError(f"{option} {text}: {error}") from None


def _words(args: argparse.Namespace) -> str:
    """Return the change as the command says it."""
    options = [
        f"--{name} {getattr(args, name)}"
        for name in ("concurrency", "rate", "cost", "burst", "pause")
        if getattr(args, name) is not None
    ]
    flags = [f"--{name}" for name in ("resume", "reset") if getattr(args, name)]
    return " ".join((args.name, *options, *flags))


def _lines(limits: Sequence[LimitRow], keys: Sequence[LimitKey], screen: Screen) -> Iterator[str]:
    if not limits:
        yield "there are no limits"
        return
    columns = (
        Column[LimitRow]("limit", lambda one: one.name, is_name=True),
        Column[LimitRow]("at once", lambda one: _number(one.concurrency), is_number=True),
        Column[LimitRow]("rate", lambda one: _per_second(one.rate), is_number=True),
        Column[LimitRow]("cost", lambda one: _per_second(one.cost_rate), is_number=True, rank=2),
        Column[LimitRow]("running", lambda one: _counted(one.running), is_number=True),
        Column[LimitRow]("waiting", lambda one: _counted(one.waiting), is_number=True),
        Column[LimitRow]("state", _state, rank=1),
    )
    yield from table_lines(columns, limits, screen)
    if keys:
        yield ""
        yield from table_lines(_key_columns(limits[0]), keys, screen)
    if len(keys) == MAX_KEYS:
        yield f"the first {MAX_KEYS} keys; there may be more"


def _key_columns(limit: LimitRow) -> tuple[Column[LimitKey], ...]:
    return (
        Column[LimitKey]("key", lambda one: one.key or "(all)", is_name=True),
        Column[LimitKey]("running", lambda one: _counted(one.running), is_number=True),
        Column[LimitKey]("waiting", lambda one: _counted(one.waiting), is_number=True),
        Column[LimitKey]("failed in a row", lambda one: _number(one.failures), is_number=True, rank=1),
        Column[LimitKey](
            "paused until",
            lambda one: "-" if one.paused_until is None else relative_time(one.paused_until, limit.seen_at),
            rank=1,
        ),
    )


def _state(one: LimitRow) -> str:
    words = []
    if one.paused_until is not None and one.is_paused:
        words.append(f"paused, on {relative_time(one.paused_until, one.seen_at)}")
    if one.changed:
        words.append(f"{', '.join(one.changed)} changed by {one.changed_by}")
    if one.is_strict:
        words.append("strict order")
    if one.is_shared:
        words.append("shared")
    return "; ".join(words) or "-"


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _counted(value: int) -> str:
    return f"{COUNTED:,}+" if value >= COUNTED else f"{value:,}"


def _per_second(value: float | None) -> str:
    return "-" if value is None else f"{value:,.4g}/s" if value < 1000 else f"{value:,.0f}/s"
