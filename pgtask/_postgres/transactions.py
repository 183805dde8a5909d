"""The transaction of the caller, and our own ones: rows that belong together are written whole or not at all.

Invariant: a write that is to be part of the caller's transaction is refused where there is none, as it would be
committed by itself. The server's last word says whether there is one; it does not matter how it was begun.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import asyncpg

from pgtask._doors import Door, door_to
from pgtask._postgres.connection import PLAN_SETTINGS, became_read_only, map_errors
from pgtask._postgres.store import statement
from pgtask.errors import DatabaseUnavailable, EnqueueError, PgtaskError

__all__ = ["atomically", "check_caller", "open_caller", "planned_by_index", "refuse_read_only"]

_SAVEPOINT = "pgtask"


def open_caller(conn: Any) -> Any:
    """Return the connection of the caller if it is asyncpg's, else a door to it.

    Raises `EnqueueError` unless it is in a transaction, or begins one with its next statement, as far as that is known
    without I/O; a door's `begin` checks the rest. Raises `DatabaseUnavailable` for a closed one.
    """
    if not _is_asyncpg(conn) and (door := door_to(conn)) is not None:
        with map_errors():
            door.check()
        return door
    check_caller(conn)
    return conn


def _is_asyncpg(conn: Any) -> bool:
    return hasattr(conn, "copy_to_table") and hasattr(conn, "is_in_transaction") and not isinstance(conn, Door)


def check_caller(conn: Any, refuse: type[PgtaskError] = EnqueueError) -> None:
    """Raise the error `refuse` unless `conn` is an asyncpg connection in a transaction. One that has failed counts: its
    next statement raises. Raises `DatabaseUnavailable` for a closed one."""
    if isinstance(conn, asyncpg.Pool):
        raise refuse("conn= is a pool; acquire a connection from it, begin a transaction, and pass the connection")
    if not _is_asyncpg(conn):
        kind = "an asyncpg connection"
        if refuse is EnqueueError:
            kind = "a connection of asyncpg, psycopg, psycopg2, SQLAlchemy (nor a session of it) or Django"
        raise refuse(f"conn={conn!r:.80} is not {kind}")
    with map_errors():
        if conn.is_closed():
            raise DatabaseUnavailable("conn= is closed")
        if conn.is_in_transaction():
            return
    raise refuse(
        "conn= is not in a transaction, so this would be committed at once, even if your own data is not; begin one "
        "before: async with conn.transaction(). If it is that of a SQLAlchemy session, pass the session itself. "
        "Pass no conn if you want no transaction"
    )


@contextmanager
def refuse_read_only(refuse: type[PgtaskError] = EnqueueError) -> Iterator[None]:
    """Raise the error `refuse` if the transaction of the caller is read-only: no try will do better. On a connection
    of ours that is a server which is a standby now, and `map_errors` has the caller wait for the primary."""
    try:
        yield
    except (DatabaseUnavailable, asyncpg.ReadOnlySQLTransactionError) as error:
        if not became_read_only(error):
            raise
        raise refuse(
            "conn= is in a read-only transaction, so nothing can be written in it: begin one that is READ WRITE, on "
            "the primary server (SQLSTATE 25006)"
        ) from error


@asynccontextmanager
async def atomically(connection: Any) -> AsyncIterator[None]:
    """Open a savepoint if the connection is in a transaction, however that was begun; else a READ COMMITTED one."""
    if not connection.is_in_transaction():
        async with connection.transaction(isolation="read_committed"):
            yield
        return
    await connection.execute(f"SAVEPOINT {_SAVEPOINT}")
    try:
        yield
    except BaseException:
        if not connection.is_closed():
            await connection.execute(f"ROLLBACK TO SAVEPOINT {_SAVEPOINT}; RELEASE SAVEPOINT {_SAVEPOINT}")
        raise
    await connection.execute(f"RELEASE SAVEPOINT {_SAVEPOINT}")


@asynccontextmanager
async def planned_by_index(connection: Any, **more: str) -> AsyncIterator[None]:
    """Let the statements inside read tables by their indexes only, in a transaction of the caller or of ours. `more`:
    other settings for them.

    A session keeps its plans: one that it has made on a small table may read all of a large one. The sessions of our
    pool have `PLAN_SETTINGS` from the start, so nothing is to do outside of a transaction. The settings of the caller
    return at the end; the server does that itself if the transaction has failed.
    """
    if not connection.is_in_transaction():
        yield
        return
    settings = {**PLAN_SETTINGS, **more}
    rows = await connection.fetch(statement("set_locally"), list(settings), list(settings.values()))
    before = [row[0] for row in rows], [row[1] for row in rows]
    try:
        yield
    except BaseException:
        with suppress(asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError):
            await connection.fetch(statement("set_locally"), *before)
        raise
    await connection.fetch(statement("set_locally"), *before)
