"""The database and the app of a command, as the settings name them.

Invariants: only a command that `creates` makes a database where none exists; the embedded server is started with a
line on stderr, and gets its schema without a command. No other server does.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from pgtask._cli.django_project import adopt_django_project
from pgtask._cli.output import note
from pgtask._postgres import embedded
from pgtask._postgres.migrate import migrate
from pgtask._postgres.tasks import open_connection
from pgtask._project import import_from_project, project_directory
from pgtask.app import App, load_app
from pgtask.config import load_config
from pgtask.errors import ConfigError, EmbeddedError

__all__ = ["Database", "configured_database", "find_database", "load_configured_app", "with_connection"]

T = TypeVar("T")


class Database(msgspec.Struct, frozen=True):
    """The database of a command. `is_pooled`: it is behind a transaction-pooling pgbouncer (setting `no-listen`)."""

    dsn: str
    is_embedded: bool = False
    is_pooled: bool = False


def configured_database(flags: Mapping[str, Any]) -> Database | None:
    """Return the database that the settings name; None for the embedded one. Raises `ConfigError`."""
    given = {"dsn": flags.get("dsn")}
    adopt_django_project(given)
    config = load_config(given)
    return None if config.dsn is None else Database(config.dsn, is_pooled=not config.listen)


def find_database(flags: Mapping[str, Any], *, creates: bool = False) -> Database:
    """Return the configured database, or the embedded one, whose server is started if it does not run. Raises
    `ConfigError`, and `EmbeddedError`, also where no database exists and the command `creates` none."""
    database = configured_database(flags)
    if database is not None:
        return database
    directory = project_directory()
    has_data = embedded.has_data(directory)
    if not has_data and not creates:
        raise EmbeddedError(_missing_database(directory))
    dsn = embedded.running_dsn(directory)
    if dsn is None:
        which = "the" if has_data else "a new"
        note(f"starting {which} embedded PostgreSQL in {directory / '.pgtask'} (to stop it: pgtask stop --server)")
        dsn = embedded.start(directory)
    return Database(dsn, is_embedded=True)


def _missing_database(directory: Path) -> str:
    """Return the message, with a database further up, which is not used because others can write there."""
    above = next((parent for parent in directory.parents if os.path.isdir(parent / ".pgtask" / "data")), None)
    hint = "" if above is None else f". There is one in {above}, which others can write to: change to it"
    return (
        f"there is no database in {directory}: name one by --dsn or DATABASE_URL, or make one here by: pgtask migrate"
        + hint
    )


def with_connection(args: argparse.Namespace, work: Callable[[Any], Awaitable[T]], *, needs_schema: bool = True) -> T:
    """Open the configured database for `work`, and return its result. The embedded one gets its schema first."""
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
    adopt_django_project({"app": reference})
    reference = load_config({"app": reference}).app
    if reference is None:
        raise ConfigError("no app is configured: name it as module:attribute, in PGTASK_APP, or in pyproject.toml")
    import_from_project()
    return load_app(reference)
