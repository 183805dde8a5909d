"""The statements, one file each, and a `Link` that carries them: one connection, one owner, reconnecting.

Invariants: a link runs one statement at a time; each statement is its own transaction and may safely be sent again,
so a link that lost its connection in the middle sends it once more. A statement never waits without bound: at its
deadline the socket is dropped, since a cancel request could leave a commit half acknowledged.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from pgtask._events import log_event
from pgtask._postgres.connection import connect, map_errors, was_rolled_back
from pgtask.errors import DatabaseUnavailable, RowsLocked

__all__ = ["HOT_SETTINGS", "Link", "statement"]

log = logging.getLogger("pgtask.postgres")

# The hot statements have one right plan each, an index scan; a plan made while the table was empty must not be another.
HOT_SETTINGS = {
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "enable_sort": "off",
    "jit": "off",
    "statement_timeout": "30s",
    "lock_timeout": "2s",
    "idle_in_transaction_session_timeout": "10s",
    "idle_session_timeout": "0",
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
}

DEADLINE = 35.0
FIRST_BACKOFF, LONGEST_BACKOFF = 0.1, 5.0


# Read at once: a worker must not mix its code with the statements of a version that is installed while it runs.
_SQL = Path(__file__).parent / "sql"
_STATEMENTS = {
    path.relative_to(_SQL).with_suffix("").as_posix(): path.read_text(encoding="utf-8") for path in _SQL.rglob("*.sql")
}


def statement(name: str) -> str:
    """The text of `sql/<name>.sql`."""
    return _STATEMENTS[name]


class Link:
    """One connection that its owner alone uses; opened when first needed, and again after it was lost.

    `on_open` is awaited with each new connection before anything else uses it (LISTEN, for one).
    """

    def __init__(
        self,
        dsn: str,
        name: str,
        *,
        pooled: bool = False,
        on_open: Callable[[Any], Awaitable[None]] | None = None,
    ) -> None:
        self._dsn = dsn
        self._name = name
        self._pooled = pooled
        self._on_open = on_open
        self._connection: Any = None
        self.statements = 0
        self.is_away = False
        """Whether it is waiting for a database that is away."""
        self.lost_at = float("-inf")
        """When it last found its connection lost, or could not have one (monotonic seconds)."""

    @property
    def connection(self) -> Any:
        """The open asyncpg connection, or None."""
        return self._connection

    async def open(self) -> Any:
        """Connect unless connected. Raises `DatabaseUnavailable` or `DatabaseRefused`; does not retry."""
        if self._connection is not None and self._connection.is_closed():
            self.drop()
        if self._connection is None:
            try:
                connection = await connect(self._dsn, name=self._name, settings=HOT_SETTINGS, pooled=self._pooled)
            except DatabaseUnavailable:
                self.lost_at = time.monotonic()
                raise
            try:
                if self._on_open is not None:
                    with map_errors():
                        await self._on_open(connection)
            except BaseException:
                connection.terminate()
                raise
            self._connection = connection
        return self._connection

    async def once(self, name: str, *args: Any, deadline: float = DEADLINE) -> list[Any]:
        """Run a statement. On any error of the connection it is dropped, and `DatabaseUnavailable` raised."""
        connection = await self.open()
        watchdog = asyncio.get_running_loop().call_later(deadline, connection.terminate)
        self.statements += 1
        try:
            with map_errors():
                rows: list[Any] = await connection.fetch(statement(name), *args)
                return rows
        except RowsLocked:
            raise  # the connection is as good as before
        except (DatabaseUnavailable, asyncio.CancelledError):
            self.drop()
            raise
        finally:
            watchdog.cancel()

    async def run(
        self, name: str, *args: Any, on_loss: Callable[[], None] | None = None, waits_for_rows: bool = True
    ) -> list[Any]:
        """Run a statement, waiting with backoff for as long as the database is away.

        `on_loss` is called when an attempt has failed in such a way that it may or may not have been carried out.
        Raises `DatabaseRefused` and `DataRefused`; unless it `waits_for_rows`, `RowsLocked` too.
        """
        backoff = Backoff()
        while True:
            try:
                rows = await self.once(name, *args)
            except DatabaseUnavailable as error:
                if isinstance(error, RowsLocked):
                    if not waits_for_rows:
                        raise
                else:
                    self.is_away = True
                if on_loss is not None and not was_rolled_back(error):
                    on_loss()
                await backoff.wait(self._name, error)
                continue
            backoff.over(self._name)
            self.is_away = False
            return rows

    async def connected(self) -> Any:
        """`open`, waiting with backoff for as long as the database is away. Raises `DatabaseRefused`."""
        backoff = Backoff()
        while True:
            try:
                connection = await self.open()
            except DatabaseUnavailable as error:
                await backoff.wait(self._name, error)
                continue
            backoff.over(self._name)
            return connection

    def drop(self) -> None:
        """Cut the connection without ceremony. Safe to call from another task of the same loop."""
        connection, self._connection = self._connection, None
        if connection is not None:
            self.lost_at = time.monotonic()
            connection.terminate()

    async def close(self) -> None:
        """Say goodbye to the server, for two seconds at most."""
        connection, self._connection = self._connection, None
        if connection is not None and not connection.is_closed():
            try:
                await connection.close(timeout=2)
            except Exception:
                connection.terminate()


class Backoff:
    """Waits that double from 0.1 to 5 s, with jitter; logs the first failure and the recovery, not each attempt."""

    def __init__(self) -> None:
        self._delay = 0.0

    async def wait(self, name: str, error: DatabaseUnavailable) -> None:
        if not self._delay:
            log_event(log, logging.WARNING, "database.away", connection=name, error=str(error))
        self._delay = min(max(FIRST_BACKOFF, self._delay * 2), LONGEST_BACKOFF)
        await asyncio.sleep(self._delay * random.uniform(0.5, 1.0))

    def over(self, name: str) -> None:
        if self._delay:
            log_event(log, logging.WARNING, "database.back", connection=name)
            self._delay = 0.0
