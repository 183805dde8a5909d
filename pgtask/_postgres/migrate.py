"""The schema: creating it, adopting a table of the Rust crate pg_task, and saying what is wrong with it.

Invariants: the SQL in `sql/migrations` is all there is, and `migrate` runs the very text that `migration_sql`
prints; it happens in one transaction, or not at all; each piece of it may run again without effect; a worker
never queues up behind our wait for a lock for longer than `lock_timeout`; a foreign table is never touched.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from typing import Any, NamedTuple

import asyncpg

from pgtask._postgres.connection import connect, map_errors
from pgtask._postgres.store import statement
from pgtask.errors import DatabaseUnavailable, SchemaError

__all__ = ["SCHEMA_VERSION", "check_schema", "migrate", "migration_sql"]

_FILES = (path.name for path in files("pgtask._postgres").joinpath("sql", "migrations").iterdir())
_NUMBERED = sorted(name.removesuffix(".sql") for name in _FILES if name[0].isdigit())
_REFUSED = "PGT01"  # the SQLSTATE of look.sql
_PAUSE = 1.0  # between two tries for the locks, so that the workers get on with their work, seconds
_SCRIPT_LOCK_TIMEOUT = 2.0  # nobody retries the printed script, seconds

SCHEMA_VERSION = int(_NUMBERED[-1].partition("_")[0])
"""What this code needs: the number of the last migration."""


class _State(NamedTuple):
    """The answer of `state.sql`."""

    version: int
    complete: bool  # the table has all our columns
    kept: bool  # and the triggers of pg_task beside ours

    def is_current(self) -> bool:
        return self.version == SCHEMA_VERSION and self.complete


def migration_sql(*, keep_pg_task: bool = False) -> str:
    """The script that does what `migrate` does, for `psql -f`; it may be run twice.

    Its `lock_timeout` ends it, with nothing changed, where the table is held by somebody else: run it again.
    """
    head = "-- Creates or upgrades the schema of pgtask, in one transaction. Run it with psql."
    begin = "\\set ON_ERROR_STOP on\nBEGIN ISOLATION LEVEL READ COMMITTED;"
    opening = _opening(keep_pg_task, _SCRIPT_LOCK_TIMEOUT)
    return f"{head}\n{begin}\n\n{opening}\n{_changes()}\nCOMMIT;\n"


async def migrate(
    dsn: str, *, keep_pg_task: bool = False, lock_timeout: float = 0.5, patience: float = 30.0
) -> list[str]:
    """Create or upgrade the schema; returns one line for each thing done, so nothing if it was up to date.

    Any number of processes may call it at once. `lock_timeout` bounds how long workers may queue up behind a
    lock that we wait for; it is tried again until `patience` has run out (both in seconds). A build of
    indexes, once begun, is not interrupted. When cancelled, nothing has been changed. `keep_pg_task` leaves
    the indexes and triggers of pg_task 1.0 beside ours. Raises `SchemaError` for a table it must not touch,
    `DatabaseUnavailable` for one that stayed locked.
    """
    connection = await connect(dsn, name="pgtask migrate")
    try:
        with map_errors(dsn), _refusals():
            state = await _state(connection)
            if state is not None and _is_done(state, keep_pg_task):
                return []
            return await _insist(connection, keep_pg_task, lock_timeout, patience)
    finally:
        await connection.close()


async def check_schema(connection: Any) -> None:
    """Raise `SchemaError`, one line with the command to run, unless the schema is what this code needs.

    One statement when all is well. The connection must not be in a transaction.
    """
    with map_errors(), _refusals():
        state = await _state(connection)
        if state is not None and state.is_current():
            return
        async with connection.transaction():
            await connection.execute(_opening(False, 0, lock=False))
            found = await _found(connection)
            database = await connection.fetchval("SELECT current_database()")
    if found == "nothing":
        raise SchemaError(f"the database {database} has no pg_task table; run: pgtask migrate")
    if found.startswith("pg_task"):
        is_of = f"the table pg_task is of the Rust crate {found}"
        raise SchemaError(f"{is_of}, not yet adopted; run: pgtask migrate")
    is_at = f"the schema of pg_task is at version {found.split()[1]}"
    raise SchemaError(f"{is_at}, this pgtask needs {SCHEMA_VERSION}; run: pgtask migrate")


async def _insist(connection: Any, keep_pg_task: bool, lock_timeout: float, patience: float) -> list[str]:
    """Try for the locks until `patience` has run out."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + patience
    while True:
        try:
            return await _apply(connection, keep_pg_task, lock_timeout)
        except (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError) as error:
            if loop.time() >= deadline:
                holders = await connection.fetchval(_text("holders"))
                raise DatabaseUnavailable(
                    f"pg_task stayed locked for {patience:g} s, now by {holders or 'nobody any more'}; "
                    "nothing was changed; end what holds it, then run again: pgtask migrate"
                ) from error
        await asyncio.sleep(min(_PAUSE, max(0.0, deadline - loop.time())))


async def _apply(connection: Any, keep_pg_task: bool, lock_timeout: float) -> list[str]:
    """Do it all in one transaction; returns what the SQL said with RAISE INFO."""
    said: list[str] = []

    def listen(_connection: Any, message: Any) -> None:
        if message.severity_en == "INFO":
            said.append(message.message)

    connection.add_log_listener(listen)
    try:
        async with connection.transaction(isolation="read_committed"):
            await connection.execute(_opening(keep_pg_task, lock_timeout))
            # Another process may have done it while we waited; the changes lock the table even if void.
            if (await _found(connection)).startswith("pgtask "):
                state = await _state(connection)
                if state is not None and _is_done(state, keep_pg_task):
                    return []
            await connection.execute(_changes())
    finally:
        connection.remove_log_listener(listen)
    return said


def _is_done(state: _State, keep_pg_task: bool) -> bool:
    return state.is_current() and (keep_pg_task or not state.kept)


async def _state(connection: Any) -> _State | None:
    """None where pgtask has never been, at the price of the transaction, if there is one."""
    try:
        row = await connection.fetchrow(_text("state"))
    except asyncpg.UndefinedTableError:
        return None
    return _State(row["version"] or 0, row["complete"], row["kept"])


async def _found(connection: Any) -> str:
    """The verdict of `look.sql`, in the transaction that ran it."""
    return str(await connection.fetchval("SELECT current_setting('pgtask.found')"))


@contextmanager
def _refusals() -> Iterator[None]:
    """Turn a refusal of `look.sql` into a `SchemaError` of the same words."""
    try:
        yield
    except asyncpg.PostgresError as error:
        if error.sqlstate != _REFUSED:
            raise
        raise SchemaError(str(error.args[0])) from error


def _opening(keep_pg_task: bool, lock_timeout: float, *, lock: bool = True) -> str:
    """The settings of the transaction, the lock against other migrations, and the look at what is there."""
    settings = [
        f"SET LOCAL pgtask.version = '{SCHEMA_VERSION}';",
        f"SET LOCAL pgtask.keep_pg_task = '{'on' if keep_pg_task else 'off'}';",
        f"SET LOCAL lock_timeout = '{round(lock_timeout * 1000)}ms';",
        "SET LOCAL statement_timeout = 0;",
        "SET LOCAL client_min_messages = warning;",
    ]
    if lock:
        settings.append("DO $$ BEGIN PERFORM pg_advisory_xact_lock(1885828193, 1); END $$;")
    return "\n".join((*settings, "", _text("look")))


def _changes() -> str:
    """All that changes something, in order."""
    return "\n".join(_text(name) for name in ("takeover", *_NUMBERED, "record"))


def _text(name: str) -> str:
    return statement(f"migrations/{name}")
