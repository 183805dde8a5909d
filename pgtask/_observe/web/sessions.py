"""The database sessions of the console.

Invariants: a page is one snapshot in a READ ONLY transaction, and none of its statements takes longer than
`PATIENCE`; only an action opens a session that may write.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from pgtask._postgres.connection import PLAN_SETTINGS, became_read_only, connect, map_errors
from pgtask._postgres.migrate import check_schema
from pgtask._postgres.times import allow_far_times
from pgtask.errors import DatabaseUnavailable

__all__ = ["PATIENCE", "WebSessions"]

PATIENCE = 2.0  # seconds
MAX_SESSIONS = 4
_TIMEOUT = f"{1000 * PATIENCE:.0f}ms"


class WebSessions:
    """A few sessions of one database, which are opened when pages need them. `pooled`: behind a pgbouncer."""

    def __init__(self, dsn: str, *, pooled: bool, writes: bool = False) -> None:
        self._dsn = dsn
        self._pooled, self._reads = pooled, not writes
        self._settings = {**PLAN_SETTINGS, "statement_timeout": _TIMEOUT, "lock_timeout": _TIMEOUT}
        if not writes:
            self._settings["default_transaction_read_only"] = "on"
        self._free: list[Any] = []
        self._slots = asyncio.Semaphore(MAX_SESSIONS)

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[Any]:
        """Yield a connection in a transaction that sees one snapshot and writes nothing."""
        async with self.session() as connection, connection.transaction(isolation="repeatable_read", readonly=True):
            await connection.execute(f"SET LOCAL statement_timeout = '{_TIMEOUT}'")
            yield connection

    @asynccontextmanager
    async def session(self) -> AsyncIterator[Any]:
        """Yield a connection outside of a transaction. Raises `DatabaseError`s."""
        async with self._slots:
            connection = await self._take()
            try:
                with map_errors():
                    yield connection
            except (asyncio.CancelledError, DatabaseUnavailable) as error:
                if isinstance(error, asyncio.CancelledError) or became_read_only(error):
                    connection.terminate()
                raise
            finally:
                if not connection.is_closed():
                    self._free.append(connection)

    async def _take(self) -> Any:
        while self._free:
            connection = self._free.pop()
            if not connection.is_closed():
                return connection
        connection = await connect(
            self._dsn, name="pgtask web", settings=self._settings, pooled=self._pooled, reads=self._reads
        )
        try:
            await check_schema(connection)
            await allow_far_times(connection)
        except BaseException:
            connection.terminate()
            raise
        return connection

    async def close(self) -> None:
        """Close the sessions that are free."""
        while self._free:
            connection = self._free.pop()
            with suppress(TimeoutError, OSError):
                await connection.close(timeout=1)
