"""The schema: create it, adopt a table of the Rust crate pg_task, report damage and repair it.

Invariants: all the SQL is in `sql/migrations`, and `migrate` runs the very text that `migration_sql` prints; it runs in
one transaction, or not at all; each piece of it may run again without effect; no worker queues up behind our wait for a
lock for longer than `lock_timeout`; a foreign table is never touched.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from typing import Any, NamedTuple

import asyncpg

from pgtask._log import EventLog
from pgtask._postgres.connection import connect, map_errors
from pgtask._postgres.store import statement
from pgtask.errors import DatabaseUnavailable, SchemaError

__all__ = ["SCHEMA_VERSION", "check_schema", "check_version", "migrate", "migrate_again", "migration_sql"]

log = EventLog("pgtask.schema")

_FILES = (path.name for path in files("pgtask._postgres").joinpath("sql", "migrations").iterdir())
_NUMBERED = sorted(name.removesuffix(".sql") for name in _FILES if name[0].isdigit())
_REFUSED = "PGT01"  # the SQLSTATE of inspect.sql
# Wrong kind of object, other columns, a name that is taken, a function or a default of another type.
_CONFLICTS = ("42809", "42703", "42P07", "42710", "42723", "42P13", "42P16", "42804")
_PAUSE = 1.0  # seconds between two tries for the locks, in which the workers can work
_SCRIPT_LOCK_TIMEOUT = 2.0  # seconds; the printed script does not try again
_FIND_DAMAGE = """\
-- The things to repair, as the setting pgtask.damage.
SET LOCAL pgtask.damage = '[]';
DO $$
BEGIN
    IF current_setting('pgtask.found') LIKE 'pgtask %%' THEN
        PERFORM set_config('pgtask.damage', (SELECT coalesce(json_agg(damage), '[]') FROM (
%s
        ) AS damage)::text, true);
    END IF;
END
$$;
"""

SCHEMA_VERSION = int(_NUMBERED[-1].partition("_")[0])
"""The version of the schema that this code makes: the number of the last migration."""

OLDEST_CODE = 6
"""The oldest code that can work with this schema, by its own SCHEMA_VERSION. A migration that removes or changes
something that older workers and clients use raises it to its own number."""


class _SchemaState(NamedTuple):
    """The answer of `state.sql`."""

    version: int
    needs_code: int
    complete: bool  # the table has all our columns
    kept: bool  # and listeners that do not say that they sleep are notified, by the triggers of pg_task or by ours

    def is_newer(self) -> bool:
        """Return whether newer code has made the schema, and this code is not too old for it."""
        return self.complete and self.needs_code <= SCHEMA_VERSION < self.version

    def is_current(self) -> bool:
        return self.version == SCHEMA_VERSION and self.complete


def migration_sql(*, keep_pg_task: bool = False) -> str:
    """Return the script that does the same as `migrate`, for `psql -f`; you may run it twice.

    Its `lock_timeout` ends it, with nothing changed, if another session holds the table: run it again.
    """
    head = "-- Creates or upgrades the schema of pgtask, in one transaction. Run it with psql."
    begin = "\\set ON_ERROR_STOP on\nBEGIN ISOLATION LEVEL READ COMMITTED;"
    opening = _opening(keep_pg_task, _SCRIPT_LOCK_TIMEOUT)
    return f"{head}\n{begin}\n\n{opening}\n{_changes()}\nCOMMIT;\n"


async def migrate(
    dsn: str, *, keep_pg_task: bool = False, lock_timeout: float = 0.5, patience: float = 30.0
) -> list[str]:
    """Create, upgrade or repair the schema. Returns a line for each thing done, so none if it was up to date.

    Any number of processes may call it at once. `lock_timeout` bounds the time for which workers may queue up behind a
    lock that we wait for; after `patience` it gives up (both in seconds). Once begun, a build of indexes is not
    interrupted. If you cancel it, nothing has been changed. `keep_pg_task` leaves the indexes and triggers of pg_task
    1.0 beside ours, and each write notifies for its workers, also on a table without those triggers. It leaves a schema
    as it is that newer code has made and this code can work with.

    Raises `SchemaError` for a table that it must not touch or cannot repair, `DatabaseUnavailable` for one that stayed
    locked.
    """
    connection = await connect(dsn, name="pgtask migrate")
    try:
        with map_errors(dsn), _map_refusals():
            state = await _read_state(connection)
            if state is not None and await _is_done(connection, state, keep_pg_task):
                return []
            return await _apply_patiently(connection, keep_pg_task, lock_timeout, patience)
    finally:
        await connection.close()


async def migrate_again(
    dsn: str, drops: Sequence[str], *, lock_timeout: float = 0.5, patience: float = 30.0
) -> list[str]:
    """Make all functions, triggers and comments again, after the statements `drops`, in one transaction; as `migrate`,
    with or without the triggers of pg_task, as it is."""
    connection = await connect(dsn, name="pgtask verify")
    try:
        with map_errors(dsn), _map_refusals():
            state = await _read_state(connection)
            keeps = state is not None and state.kept
            return await _apply_patiently(connection, keeps, lock_timeout, patience, drops)
    finally:
        await connection.close()


async def check_version(connection: Any) -> None:
    """Raise `SchemaError` unless the schema is of the version of this code. It may be damaged."""
    with map_errors():
        state = await _read_state(connection)
    if state is None or state.version < SCHEMA_VERSION:
        await check_schema(connection)
    elif state.version > SCHEMA_VERSION:
        raise SchemaError(
            f"the schema of pg_task is at version {state.version}, this pgtask knows only {SCHEMA_VERSION}; "
            "use a newer pgtask"
        )


async def check_schema(connection: Any) -> None:
    """Raise `SchemaError`, one line with the command to run, unless this code can work with the schema. Log a warning
    that names the missing parts of it.

    It sends two statements when all is well. The connection must not be in a transaction.
    """
    with map_errors(), _map_refusals():
        state = await _read_state(connection)
        if state is not None and state.is_newer():
            return
        if state is not None and state.is_current():
            if damage := await _find_damage(connection):
                log.warning("schema.damaged", missing=", ".join(damage), remedy="pgtask migrate")
            return
        async with connection.transaction():
            await connection.execute(_opening(False, 0, lock=False))
            found = await _read_found(connection)
            database = await connection.fetchval("SELECT current_database()")
    if found == "nothing":
        raise SchemaError(f"the database {database} has no pg_task table; run: pgtask migrate")
    if found.startswith("pg_task"):
        is_of = f"the table pg_task is of the Rust crate {found}"
        raise SchemaError(f"{is_of}, not yet adopted; run: pgtask migrate")
    is_at = f"the schema of pg_task is at version {found.split()[1]}"
    raise SchemaError(f"{is_at}, this pgtask needs {SCHEMA_VERSION}; run: pgtask migrate")


async def _apply_patiently(
    connection: Any, keep_pg_task: bool, lock_timeout: float, patience: float, drops: Sequence[str] | None = None
) -> list[str]:
    """Apply the changes; try for the locks for `patience` seconds."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + patience
    while True:
        try:
            return await _apply(connection, keep_pg_task, lock_timeout, drops)
        except (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError) as error:
            if loop.time() >= deadline:
                holders = await connection.fetchval(_text("holders"))
                raise DatabaseUnavailable(
                    f"pg_task stayed locked for {patience:g} s, now by {holders or 'no session any more'}; "
                    "nothing was changed; end what holds it, then run again: pgtask migrate"
                ) from error
        await asyncio.sleep(min(_PAUSE, max(0.0, deadline - loop.time())))


async def _apply(connection: Any, keep_pg_task: bool, lock_timeout: float, drops: Sequence[str] | None) -> list[str]:
    """Apply all changes in one transaction, even if they are done where there are `drops`; return the messages that the
    SQL has raised as INFO."""
    messages: list[str] = []

    def listen(_connection: Any, message: Any) -> None:
        if message.severity_en == "INFO":
            messages.append(message.message)

    connection.add_log_listener(listen)
    try:
        async with connection.transaction(isolation="read_committed"):
            await connection.execute(_opening(keep_pg_task, lock_timeout))
            # Another process may have done it while we waited; the changes lock the table even if void.
            if drops is not None:
                for drop in drops:
                    await connection.execute(drop)
                await connection.execute(_FIND_DAMAGE % _text("damage"))
            elif (await _read_found(connection)).startswith("pgtask "):
                state = await _read_state(connection)
                if state is not None and await _is_done(connection, state, keep_pg_task):
                    return []
            await connection.execute(_changes())
            if damage := await _find_damage(connection):
                raise SchemaError(f"cannot make {', '.join(damage)}: does another object have that name?")
    except asyncpg.PostgresError as error:
        if (conflict := await _explain_conflict(connection, error)) is None:
            raise
        raise conflict from error
    finally:
        connection.remove_log_listener(listen)
    return messages


async def _is_done(connection: Any, state: _SchemaState, keep_pg_task: bool) -> bool:
    if state.is_newer():
        return True
    return state.is_current() and keep_pg_task == state.kept and not await _find_damage(connection)


async def _find_damage(connection: Any) -> list[str]:
    """Return the missing and disabled parts of the schema, by names for people."""
    return [row["label"] for row in await connection.fetch(_text("damage"))]


async def _read_state(connection: Any) -> _SchemaState | None:
    """Return the state of the schema, or None if there is none; that aborts an open transaction."""
    try:
        row = await connection.fetchrow(_text("state"))
    except asyncpg.UndefinedTableError:
        return None
    return _SchemaState(row["version"] or 0, row["needs_code"] or 0, row["complete"], row["kept"])


async def _read_found(connection: Any) -> str:
    """Return the result of `inspect.sql`, in the transaction that ran it."""
    return str(await connection.fetchval("SELECT current_setting('pgtask.found')"))


@contextmanager
def _map_refusals() -> Iterator[None]:
    """Turn a refusal of `inspect.sql` into a `SchemaError` of the same words."""
    try:
        yield
    except asyncpg.PostgresError as error:
        if error.sqlstate != _REFUSED:
            raise
        raise SchemaError(str(error.args[0])) from error


async def _explain_conflict(connection: Any, error: asyncpg.PostgresError) -> SchemaError | None:
    """Explain a change that has failed and was rolled back: another object has one of our names, or a constraint or
    unique index of ours does not allow some rows. None if the error is of another kind."""
    state, text = error.sqlstate or "", str(error.args[0])
    if state.startswith("23"):
        remedy = "change or remove these rows"
        if isinstance(error, asyncpg.UniqueViolationError) and error.detail:  # others would quote the row
            text = f"{text}: {error.detail.rstrip('.')}"
    elif state in _CONFLICTS:
        remedy = "rename or drop what has our name"
        try:
            if lost := await _find_damage(connection):
                text = f"{text}; to be made: {', '.join(lost)}"
        except asyncpg.UndefinedTableError:
            pass  # there is no schema of pgtask yet
    else:
        return None
    return SchemaError(f"cannot migrate, nothing was changed: {text}; {remedy}, then run: pgtask migrate")


def _opening(keep_pg_task: bool, lock_timeout: float, *, lock: bool = True) -> str:
    """The settings of the transaction, the lock against other migrations, and the inspection of the database."""
    settings = [
        f"SET LOCAL pgtask.version = '{SCHEMA_VERSION}';",
        f"SET LOCAL pgtask.needs_code = '{OLDEST_CODE}';",
        f"SET LOCAL pgtask.keep_pg_task = '{'on' if keep_pg_task else 'off'}';",
        f"SET LOCAL lock_timeout = '{round(lock_timeout * 1000)}ms';",
        "SET LOCAL statement_timeout = 0;",
        "SET LOCAL client_min_messages = warning;",
    ]
    if lock:
        settings.append("DO $$ BEGIN PERFORM pg_advisory_xact_lock(1885828193, 1); END $$;")
    opening = "\n".join((*settings, "", _text("inspect")))
    return f"{opening}\n{_FIND_DAMAGE % _text('damage')}" if lock else opening


def _changes() -> str:
    """All statements that change something, in order."""
    return "\n".join(_text(name) for name in ("takeover", *_NUMBERED, "record", "comments", "repair"))


def _text(name: str) -> str:
    return statement(f"migrations/{name}")
