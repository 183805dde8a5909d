"""`pgtask verify`: the schema compared with what the migrations make, and its repair."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from pgtask._cli.database import find_database, with_connection
from pgtask._cli.options import add_json
from pgtask._cli.output import SOME_FAILED, json_line, note, write_lines
from pgtask._cli.parser import Parser
from pgtask._cli.tables import Screen, detect_screen, printable, wrap_sentence
from pgtask._postgres.migrate import check_version
from pgtask._postgres.repair import repair_schema
from pgtask._postgres.verify import (
    OPERATOR,
    READER,
    REPAIR,
    WORKER,
    Difference,
    find_differences,
    find_missing_grants,
    role_exists,
)
from pgtask.errors import ConfigError

__all__ = ["HELP", "SUMMARY", "add_arguments", "run"]

SUMMARY = "compare the schema with what it should be"
HELP = """\
Compare the live schema with what the migrations make: tables, columns, defaults, functions, triggers, indexes,
constraints, comments; and tell the privileges that the role lacks. It reads the catalog only. The exit code is 0 if all
is as it should be, and 1 otherwise.

--repair makes again what is missing, disabled, not valid or different, without a loss of data: triggers, functions,
defaults and comments in one transaction, indexes CONCURRENTLY, which waits for the transactions of others. It leaves
what may lose data or fail on rows, such as the type of a column, and grants.
"""

_Row = tuple[str, str, str, bool]  # a thing, its problem, the remedy, whether --repair repairs it


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--repair", action="store_true", help="repair what can be repaired safely")
    parser.add_argument("--role", metavar="ROLE", help="the role whose privileges to check (default: yours)")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--reader", action="store_true", help="the role only reads: list, stats, check")
    kind.add_argument("--operator", action="store_true", help="the role also pauses, prunes, and changes tasks in bulk")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    found, missing = with_connection(args, lambda connection: _verify(connection, args), needs_schema=False)
    repairable = [one for one in found if one.repair is not None]
    if args.repair and repairable:
        asyncio.run(repair_schema(find_database(vars(args)).dsn, found))
        found, missing = with_connection(args, lambda connection: _verify(connection, args), needs_schema=False)
    left = {one.thing.key for one in found}
    rows = [(one.thing.label, one.problem, one.remedy, one.repair is not None) for one in found]
    rows += [(what, "is not for the role", remedy, False) for what, remedy in missing]
    repaired = [one for one in repairable if one.thing.key not in left] if args.repair else []
    write_lines(_lines(rows, repaired, args, detect_screen(sys.stdout)))
    if not args.json:
        note(_summary(len(rows), len(repaired), 0 if args.repair else len(repairable)))
    return SOME_FAILED if rows else 0


async def _verify(connection: Any, args: argparse.Namespace) -> tuple[list[Difference], list[tuple[str, str]]]:
    await check_version(connection)
    if args.role is not None and not await role_exists(connection, args.role):
        raise ConfigError(f"--role {args.role}: there is no such role")
    needed = READER if args.reader else OPERATOR if args.operator else WORKER
    return await find_differences(connection), await find_missing_grants(connection, args.role, needed)


def _lines(
    rows: Sequence[_Row], repaired: Sequence[Difference], args: argparse.Namespace, screen: Screen
) -> Iterator[str]:
    for one in repaired:
        if args.json:
            yield json_line({"thing": one.thing.label, "problem": one.problem, "remedy": None, "repaired": True})
        else:
            yield from wrap_sentence(
                f"repaired: {printable(one.thing.label)} ({printable(one.problem)})", screen, "    "
            )
    for thing, problem, remedy, is_repairable in rows:
        if args.json:
            yield json_line({"thing": thing, "problem": problem, "remedy": remedy, "repaired": False})
        else:
            text = f"{thing} {problem}" if is_repairable else f"{thing} {problem}; run: {remedy}"
            yield from wrap_sentence(printable(text), screen, "    ")


def _summary(left: int, repaired: int, repairable: int) -> str:
    done = f"{repaired} repaired" if repaired else ""
    if not left:
        return "; ".join(filter(None, (done, "the schema is as it should be")))
    found = f"{left} difference{'' if left == 1 else 's'}{' left' if repaired else ''}"
    hint = f"to repair {'it' if left == 1 else repairable if repairable < left else 'them'}: {REPAIR}"
    return "; ".join(filter(None, (done, found, hint if repairable else "")))
