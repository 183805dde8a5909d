"""The statements, one file each, and a `Link` that carries them: one connection, one owner, reconnecting.

Invariants: a link runs one statement at a time; each statement is its own transaction and is safe to send again, so a
link that lost its connection in the middle sends it once more. A statement never waits without bound: at its deadline
the link drops the socket, since a cancel request could leave a commit half acknowledged.
"""

from __future__ import annotations

import asyncio
import functools
import random
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from pgtask._backoff import Backoff
from pgtask._log import EventLog
from pgtask._postgres.connection import PLAN_SETTINGS, connect, fetch_in_transaction, map_errors, was_rolled_back
from pgtask.errors import DatabaseRefused, DatabaseUnavailable, RowsLocked, StatementTimeout

__all__ = ["HOT_SETTINGS", "Link", "statement"]

log = EventLog("pgtask.postgres")

_TRANSACTION_SETTINGS = {
    "statement_timeout": "30s",
    # No statement waits for a row that it can skip. Those that write outcomes wait so long, and not at all in a trigger
    # of ours.
    "lock_timeout": "500ms",
    "pgtask.nowait": "on",
    "idle_in_transaction_session_timeout": "10s",
}

HOT_SETTINGS = {
    **PLAN_SETTINGS,
    **_TRANSACTION_SETTINGS,
    "idle_session_timeout": "0",
    # The server ends the session of a host that is gone, and its locks, as soon as we leave a server that is gone.
    "tcp_keepalives_idle": "5",
    "tcp_keepalives_interval": "2",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "10000",
}

DEADLINE = 35.0
INITIAL_PAUSE, MAX_PAUSE = 0.1, 5.0  # seconds between two tries

# Read at import: a worker must not mix its code with the statements of a version that is installed while it runs.
_SQL = Path(__file__).parent / "sql"
_FILES = {
    path.relative_to(_SQL).with_suffix("").as_posix(): path.read_text(encoding="utf-8") for path in _SQL.rglob("*.sql")
}
_INCLUDE = re.compile(r"^ *-- include: (\S+)\.sql\n", re.MULTILINE)
_MARK = re.compile(r"^( *)-- (traced|grouped|archived|kept): ", re.MULTILINE)
_ALWAYS = "_members"  # the end of the names of statements that write members of groups


def _with_includes(text: str) -> str:
    """Replace each line `-- include: NAME.sql` by the text of that file, without its heading comment. A file that is
    included may include others."""

    def included(match: re.Match[str]) -> str:
        lines = _FILES[match[1]].splitlines(keepends=True)
        heading = next(number for number, line in enumerate(lines) if not line.startswith("--"))
        return _with_includes("".join(lines[heading:]))

    return _INCLUDE.sub(included, text)


def _with_marked(text: str, *kinds: str) -> str:
    """Return a text with what its lines with these marks say."""
    return _with_includes(_MARK.sub(lambda match: match[1] if match[2] in kinds else match[0], text))


@functools.cache
def _variants(name: str) -> Mapping[str, str]:
    """Return the statements of a file by their names. A process uses few of all: nothing is put together at import."""
    always = ("traced", "grouped") if name.endswith(_ALWAYS) else ()
    text = _with_includes(_FILES[name])
    variants = {name: _with_marked(text, *always)}
    for kind in {match[2] for match in _MARK.finditer(text)}.difference(always):
        variants[f"{name}:{kind}"] = _with_marked(text, *always, *(("traced",) if kind == "grouped" else ()), kind)
    return variants


def statement(name: str) -> str:
    """Return the text of `sql/<name>.sql`, with what it includes. That of `<name>:traced` also has what its lines
    `-- traced: ` say, for the trace of a task: who does not trace does not name the column. So has that of
    `<name>:grouped`, with its lines `-- grouped: ` for groups of tasks; a file named `..._members` always has both."""
    return _variants(name.partition(":")[0])[name]


class Link:
    """A connection with one owner; opened when first needed, and again after a loss.

    `on_open` is awaited with each new connection before anything else uses it (LISTEN, for one). `settings` are those
    of its session that differ from `HOT_SETTINGS`. If it only `reads`, a standby among several hosts will do.
    """

    def __init__(
        self,
        dsn: str,
        name: str,
        *,
        pooled: bool = False,
        on_open: Callable[[Any], Awaitable[None]] | None = None,
        settings: Mapping[str, str] | None = None,
        reads: bool = False,
    ) -> None:
        self._dsn = dsn
        self._name = name
        self._pooled = pooled
        self._reads = reads
        self._on_open = on_open
        self._settings = {**HOT_SETTINGS, **(settings or {})}
        # Behind a pooler each statement brings these along.
        self._local_settings = {name: self._settings[name] for name in (*PLAN_SETTINGS, *_TRANSACTION_SETTINGS)}
        self._connection: Any = None
        self.statements = 0
        self._was_sent = False  # whether the last statement has reached a connection
        self.outage: str | None = None
        """The error of the last try, while the database is unavailable."""
        self.end_transaction: Callable[[], Awaitable[None]] | None = None
        """Ends the transaction that is open on its connection (held.py), since each statement is its own."""
        self.lost_at = float("-inf")
        """The time at which it last was without a connection after a loss (monotonic seconds)."""

    @property
    def is_unavailable(self) -> bool:
        """Return whether its last try has found the database unavailable."""
        return self.outage is not None

    @property
    def is_open(self) -> bool:
        """Return whether it has a connection now."""
        return self._connection is not None and not self._connection.is_closed()

    @property
    def local_settings(self) -> Mapping[str, str]:
        """The settings that a transaction behind a pooler brings along; none without one."""
        return self._local_settings if self._pooled else {}

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
                connection = await connect(
                    self._dsn, name=self._name, settings=self._settings, pooled=self._pooled, reads=self._reads
                )
            except DatabaseUnavailable as error:
                self.lost_at = time.monotonic()
                self._note_outage(error)
                raise
            try:
                if self._on_open is not None:
                    with map_errors():
                        await self._on_open(connection)
            except BaseException:
                connection.terminate()
                raise
            if self.lost_at > float("-inf"):
                self.lost_at = time.monotonic()
            self._connection = connection
        return self._connection

    async def once(self, name: str, *args: Any, deadline: float = DEADLINE) -> list[Any]:
        """Run a statement, without a retry. On an error of the connection, drop it and raise `DatabaseUnavailable`.

        Raises `RowsLocked` if a lock, and `StatementTimeout` if the statement itself, took longer than the session
        allows; the connection is as good as before then. Cancelling it drops the connection; the server may or may not
        carry the statement out.
        """
        text = statement(name)
        self._was_sent = False
        if self.end_transaction is not None:
            await self.end_transaction()
        connection = await self.open()
        self._was_sent = True
        if self._pooled:
            sent = fetch_in_transaction(connection, self._local_settings, text, *args)
        else:
            sent = connection.fetch(text, *args)
        rows: list[Any] = await self.guard(connection, name, sent, deadline=deadline)
        return rows

    async def guard(self, connection: Any, name: str, sent: Awaitable[Any], *, deadline: float = DEADLINE) -> Any:
        """Wait for what was sent over `connection`, our present one, and return its answer. Raises as `once` does."""
        watchdog = asyncio.get_running_loop().call_later(deadline, connection.terminate)
        self.statements += 1
        try:
            with map_errors():
                answer = await sent
        except (RowsLocked, StatementTimeout):
            if self.outage is not None:
                self._note_recovery()
            raise
        except DatabaseUnavailable as error:
            self.drop()
            self._note_outage(error)
            raise
        except DatabaseRefused as error:
            log.error("database.refused", connection=self._name, statement=name, error=str(error))
            raise
        except asyncio.CancelledError:
            self.drop()
            raise
        finally:
            watchdog.cancel()
        if self.outage is not None:
            self._note_recovery()
        return answer

    async def run(
        self,
        name: str,
        *args: Any,
        on_loss: Callable[[], None] | None = None,
        raises: tuple[type[RowsLocked | StatementTimeout], ...] = (),
    ) -> list[Any]:
        """Run a statement, waiting with backoff for as long as the database is unavailable.

        It calls `on_loss` when an attempt has failed and the server may or may not have carried it out. Raises
        `DatabaseRefused`, `DataRefused`, and those errors to which the caller has an answer: `raises`.
        """
        backoff = Backoff(INITIAL_PAUSE, MAX_PAUSE)
        while True:
            try:
                return await self.once(name, *args)
            except DatabaseUnavailable as error:
                if on_loss is not None and self._was_sent and not was_rolled_back(error):
                    on_loss()
                if isinstance(error, raises):
                    raise
                if isinstance(error, RowsLocked | StatementTimeout) and backoff.is_reset:
                    event = "database.locked" if isinstance(error, RowsLocked) else "database.slow"
                    log.warning(event, connection=self._name, statement=name, error=str(error))
            await _pause(backoff)

    async def connected(self, check: Callable[[Any], Awaitable[None]] | None = None) -> Any:
        """Open the connection and `check` it, waiting with backoff for as long as the database is unavailable.

        A pooler may let a client in while the server behind it is unavailable: then the `check` fails, and runs again
        on a new connection. Raises `DatabaseRefused`, and other errors of `check`.
        """
        backoff = Backoff(INITIAL_PAUSE, MAX_PAUSE)
        while True:
            try:
                connection = await self.open()
                if check is not None:
                    await check(connection)
            except DatabaseUnavailable as error:
                self.drop()
                self._note_outage(error)
                await _pause(backoff)
                continue
            if self.outage is not None:
                self._note_recovery()
            return connection

    def _note_outage(self, error: DatabaseUnavailable) -> None:
        """Log the first failure of an outage, not each attempt."""
        if self.outage is None:
            log.warning("database.unavailable", connection=self._name, error=str(error))
        self.outage = str(error)

    def _note_recovery(self) -> None:
        self.outage = None
        log.warning("database.recovered", connection=self._name)

    def drop(self) -> None:
        """Abort the connection. Safe to call from another task of the same loop."""
        connection, self._connection = self._connection, None
        if connection is not None:
            self.lost_at = time.monotonic()
            connection.terminate()

    async def close(self) -> None:
        """Close gracefully, waiting at most two seconds."""
        connection, self._connection = self._connection, None
        if connection is not None and not connection.is_closed():
            try:
                await connection.close(timeout=2)
            except Exception:
                connection.terminate()


async def _pause(backoff: Backoff) -> None:
    """Wait before the next attempt, with jitter."""
    await asyncio.sleep(backoff.next() * random.uniform(0.5, 1.0))
