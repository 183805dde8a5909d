"""`pgtask limit`: show the limits and their keys, and change them while workers run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from pgtask._cli.database import with_connection
from pgtask._cli.limit_words import breaker_words, cost_words, key_words, order_words, rate_words, state_words
from pgtask._cli.options import add_json
from pgtask._cli.output import json_line, write_lines
from pgtask._cli.parser import Parser
from pgtask._cli.quantities import relative_time
from pgtask._cli.tables import Column, Screen, detect_screen, printable, table_lines, wrap_sentence
from pgtask._durations import parse_duration
from pgtask._nearest import did_you_mean
from pgtask._operator import operator_name
from pgtask._postgres.limits import COUNTED, LimitChange, LimitKey, LimitRow, change_limit, read_keys, read_limits
from pgtask._rates import parse_count, parse_rate
from pgtask.errors import ConfigError
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

    async def change_and_read(connection: Any) -> tuple[list[LimitRow], list[LimitKey], bool, list[str]]:
        found = await read_limits(connection)
        known = [one.name for one in found]
        if args.name is None or args.name not in known:
            return [] if args.name else found, [], False, known
        if change is not None:
            one = found[known.index(args.name)]
            if one.is_strict and args.concurrency not in (None, "0", "1"):
                raise ConfigError(f"the limit {args.name} is in strict order: --concurrency must be 1, or 0 to stop it")
            await change_limit(connection, args.name, change, _words(args), operator_name())
        keys, is_cut = ([], False) if change is not None else await read_keys(connection, args.name)
        return await read_limits(connection, args.name), keys, is_cut, known

    limits, keys, is_cut, known = with_connection(args, change_and_read)
    if args.name is not None and not limits:
        hint = did_you_mean(args.name, known) if known else "; workers write the limits of an app when they start"
        raise ConfigError(f"there is no limit {args.name}{hint}")
    if args.json:
        shown = [_json(one) | ({"keys": keys} if args.name else {}) for one in limits]
        write_lines([json_line(one) for one in shown])
    else:
        write_lines(_lines(limits, keys, is_cut, detect_screen(sys.stdout)))
    return 0


def _json(one: LimitRow) -> dict[str, Any]:
    weights = None if one.weights is None else msgspec.json.decode(one.weights)
    return msgspec.structs.asdict(one) | {"weights": weights}


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
    try:
        return parse_count(text)
    except ValueError as error:
        raise ConfigError(f"--concurrency {text} {error}") from None


def _rate(option: str, text: str, burst: float | None) -> Rate | None:
    try:
        return parse_rate(text, burst=burst, of="units" if option == "--cost" else None)
    except ValueError as error:
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


def _lines(limits: Sequence[LimitRow], keys: Sequence[LimitKey], is_cut: bool, screen: Screen) -> Iterator[str]:
    if not limits:
        yield "there are no limits"
        return
    yield from table_lines(COLUMNS, limits, screen)
    if keys:
        yield ""
        yield from table_lines(_key_columns(limits[0]), keys, screen)
        yield from _blocked_lines(keys, screen)
    if is_cut:
        yield f"the {len(keys)} keys that hold up most, of those looked at; there are more"


def _blocked_lines(keys: Sequence[LimitKey], screen: Screen) -> Iterator[str]:
    """Name the tasks that hold up keys in strict order."""
    for one in keys:
        if one.blocked_by is not None:
            what = "is parked: retry or cancel it" if one.is_parked else "waits for its retry"
            line = f"{one.key or 'the limit'} goes on after task {one.blocked_by}, which {what}"
            yield from wrap_sentence(printable(line), screen, "  ")


COLUMNS = (
    Column[LimitRow]("limit", lambda one: one.name, is_name=True),
    Column[LimitRow]("at once", lambda one: _number(one.concurrency), is_number=True),
    Column[LimitRow]("rate", rate_words, is_number=True),
    Column[LimitRow]("cost", cost_words, is_number=True, usual="-", rank=2),
    Column[LimitRow]("breaker", breaker_words, usual="-", rank=3),
    Column[LimitRow]("keys", order_words, usual="-", rank=4),
    Column[LimitRow]("running", lambda one: _counted(one.running), is_number=True),
    Column[LimitRow]("waiting", lambda one: _counted(one.waiting), is_number=True),
    Column[LimitRow]("state", state_words, rank=1),
)


def _key_columns(limit: LimitRow) -> tuple[Column[LimitKey], ...]:
    def paused(one: LimitKey) -> str:
        return "-" if one.paused_until is None else relative_time(one.paused_until, limit.seen_at)

    return (
        Column[LimitKey]("key", lambda one: one.key or "(all)", is_name=True),
        Column[LimitKey]("running", lambda one: _counted(one.running), is_number=True),
        Column[LimitKey]("waiting", lambda one: _counted(one.waiting), is_number=True),
        Column[LimitKey]("failed in a row", lambda one: _number(one.failures), is_number=True, rank=2),
        Column[LimitKey]("paused until", paused, rank=1),
        Column[LimitKey]("state", lambda one: key_words(limit, one), usual="-"),
    )


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _counted(value: int) -> str:
    return f"{COUNTED:,}+" if value >= COUNTED else f"{value:,}"
