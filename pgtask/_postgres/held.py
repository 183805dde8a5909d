"""held: a transaction that holds the rows of tasks while their steps run, over the connection of a `Link`.

Invariants: each statement of a transaction goes over the connection on which it began, or fails; the statements that
write outcomes change nothing outside of it, whatever a pooler does. A transaction that was begun and not used holds
neither rows nor a snapshot.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

from pgtask._postgres.store import Link, statement
from pgtask.errors import DatabaseError, DatabaseUnavailable

__all__ = ["HeldTransaction"]


class HeldTransaction:
    """The transactions over `link`, one after the other. The server ends one that is idle for longer than that."""

    def __init__(self, link: Link, *, idle_timeout: float) -> None:
        self._link = link
        self.mark = os.urandom(8).hex()
        """The value of the setting `pgtask.held` in these transactions, and in no others."""
        timeout = {"idle_in_transaction_session_timeout": f"{int(1000 * idle_timeout)}ms"}
        settings = {**link.local_settings, **timeout, "pgtask.held": self.mark}
        values = "".join(f"; SET LOCAL {name} = '{value}'" for name, value in settings.items())
        self._begin = f"BEGIN ISOLATION LEVEL READ COMMITTED{values}"
        self._connection: Any = None  # of the transaction that is open

    @property
    def is_open(self) -> bool:
        """Return whether a transaction was begun and not ended."""
        return self._connection is not None

    async def begin(self) -> None:
        """Begin a transaction, unless one is open and its connection is as well."""
        if self._connection is not None and self._is_gone():
            self._note_open(None)
        if self._connection is None:
            connection = await self._link.open()
            await self._link.guard(connection, "begin", connection.execute(self._begin))
            self._note_open(connection)

    async def fetch(self, name: str, *args: Any) -> list[Any]:
        """Run a statement and return its rows. Raises as `Link.once` does."""
        self._check()
        rows: list[Any] = await self._link.guard(self._connection, name, self._connection.fetch(statement(name), *args))
        return rows

    async def execute(self, name: str, *args: Any) -> int:
        """Run a statement without rows in its answer, and return how many it has changed."""
        self._check()
        sent = self._connection.execute(statement(name), *args)
        tag: str = await self._link.guard(self._connection, name, sent)
        return int(tag.rpartition(" ")[2])

    async def commit(self, *, begins: bool = False) -> None:
        """Commit, and begin the next transaction in the same round trip if `begins`. If it raises an error that the
        server has not reported itself, the transaction may or may not be committed."""
        self._check()
        connection = self._note_open(None)
        text = f"COMMIT; {self._begin}" if begins else "COMMIT"
        await self._link.guard(connection, "commit", connection.execute(text))
        if begins:
            self._note_open(connection)

    async def roll_back(self) -> None:
        """End the transaction, if one is open, and undo it."""
        connection = self._note_open(None)
        if connection is not None and self._link.connection is connection and not connection.is_closed():
            with contextlib.suppress(DatabaseError):
                await self._link.guard(connection, "rollback", connection.execute("ROLLBACK"))

    def _note_open(self, connection: Any) -> Any:
        """Note the connection on which a transaction is open, or None; return the one before."""
        before, self._connection = self._connection, connection
        self._link.end_transaction = None if connection is None else self.roll_back
        return before

    def _is_gone(self) -> bool:
        return self._link.connection is not self._connection or bool(self._connection.is_closed())

    def _check(self) -> None:
        if self._connection is None or self._is_gone():
            raise DatabaseUnavailable("the connection of the transaction was lost")
