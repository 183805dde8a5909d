"""`pgtask migrate`: create the table, or bring it up to date."""

from __future__ import annotations

import argparse
import asyncio

from pgtask._cli.database import find_database
from pgtask._cli.output import write_lines
from pgtask._cli.parser import Parser
from pgtask._postgres.migrate import migrate, migration_sql

__all__ = ["HELP", "SUMMARY", "add_arguments", "run"]

SUMMARY = "create the table, or bring it up to date"
HELP = """\
Create the table pg_task, or bring it up to date. It also adopts, with all its rows, the table of the Rust crate
pg_task, and restores what is missing or disabled: triggers, functions, indexes, defaults. Prints what it did. You may
run it at any time, as often as you like.
"""


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--sql", action="store_true", help="print the script for psql, and do nothing")
    parser.add_argument(
        "--keep-pg-task",
        action="store_true",
        help="leave the indexes and triggers of pg_task 1.0, and always notify, for Rust workers",
    )


def run(args: argparse.Namespace) -> int:
    if args.sql:
        write_lines([migration_sql(keep_pg_task=args.keep_pg_task)], end="")
        return 0
    database = find_database(vars(args), creates=True)
    write_lines(asyncio.run(migrate(database.dsn, keep_pg_task=args.keep_pg_task)) or ["the schema is up to date"])
    return 0
