"""What the settings name: the database a command works on, and the app.

Invariant: the embedded server is started, with one line on stderr, and gets its schema unasked; no other server does.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from pgtask._cli.output import say
from pgtask._postgres import embedded
from pgtask._postgres.migrate import migrate
from pgtask._postgres.tasks import open_connection
from pgtask.app import App, load_app
from pgtask.config import load_config
from pgtask.errors import ConfigError

__all__ = ["Database", "configured_database", "find_database", "load_configured_app", "with_connection"]

T = TypeVar("T")


class Database(msgspec.Struct, frozen=True):
    """`is_pooled`: it is behind a transaction-pooling pgbouncer, as `no-listen` in the settings says."""

    dsn: str
    is_embedded: bool = False
    is_pooled: bool = False


def configured_database(flags: Mapping[str, Any]) -> Database | None:
    """The one that the flags, the environment or the file name; None for the embedded one. Raises `ConfigError`."""
    config = load_config({"dsn": flags.get("dsn")})
    return None if config.dsn is None else Database(config.dsn, is_pooled=not config.listen)


def find_database(flags: Mapping[str, Any]) -> Database:
    """As `configured_database`, but the embedded server is started if need be. Raises `EmbeddedError` too."""
    database = configured_database(flags)
    if database is not None:
        return database
    directory = Path.cwd()
    dsn = embedded.running_dsn(directory)
    if dsn is None:
        where = directory / ".pgtask"
        say(f"starting the embedded PostgreSQL in {where} (to end it: pgtask stop --server)")
        dsn = embedded.start(directory)
    return Database(dsn, is_embedded=True)


def with_connection(args: argparse.Namespace, work: Callable[[Any], Awaitable[T]], *, needs_schema: bool = True) -> T:
    """Open the configured database for one piece of work. The embedded one is ours: it gets its schema unasked."""
    database = find_database(vars(args))

    async def connect_and_work() -> T:
        if database.is_embedded:
            await migrate(database.dsn)
        name = f"pgtask {args.command}"
        async with open_connection(
            database.dsn, name=name, pooled=database.is_pooled, needs_schema=needs_schema
        ) as connection:
            return await work(connection)

    return asyncio.run(connect_and_work())


def load_configured_app(reference: str | None) -> App:
    reference = load_config({"app": reference}).app
    if reference is None:
        raise ConfigError("no app is configured: name it as module:attribute, in PGTASK_APP, or in pyproject.toml")
    if sys.path[:1] != [os.getcwd()]:  # as the workers do: a console script has its own directory there
        sys.path.insert(0, os.getcwd())
    return load_app(reference)
