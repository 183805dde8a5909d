"""The door to connections of psycopg2.

Invariant: the cursors are psycopg2's plain ones, whatever the cursor factory of the caller.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from io import BytesIO
from typing import Any

import psycopg2
from psycopg2 import extensions

from pgtask._doors.door import (
    Door,
    as_named_text,
    raise_closed,
    raise_outside,
    server_error,
    whole_copies,
)
from pgtask._placeholders import translate
from pgtask.errors import EnqueueError

__all__ = ["open_door"]


def open_door(conn: Any) -> Door:
    if isinstance(conn, extensions.connection):
        return _Psycopg2Door(conn)
    if type(conn).__module__ == "psycopg2.pool":
        raise EnqueueError("conn= is a pool; take a connection from it: pool.getconn()")
    raise EnqueueError(f"conn= is a {type(conn).__name__} of psycopg2; pass the connection itself")


class _Psycopg2Door(Door):
    def __init__(self, conn: Any) -> None:
        self._conn = conn

    def check(self) -> None:
        if self._conn.closed:
            raise_closed()
        if self._conn.async_:
            raise EnqueueError("conn= is an asynchronous connection of psycopg2; connect without async_=1")
        if self._conn.autocommit and self._conn.info.transaction_status == extensions.TRANSACTION_STATUS_IDLE:
            raise_outside("its autocommit is on: set conn.autocommit = False, or execute BEGIN before")

    def is_closed(self) -> bool:
        return bool(self._conn.closed)

    def _error(self, error: Any) -> Any:
        return server_error(error, is_lost=bool(self._conn.closed) or isinstance(error, psycopg2.OperationalError))

    async def _fetch(self, query: str, args: Sequence[Any]) -> tuple[Any, Sequence[Sequence[Any]]]:
        try:
            cursor = self._conn.cursor(cursor_factory=extensions.cursor)
            if args:
                cursor.execute(translate(query, "pyformat")[0], as_named_text(args))
            else:
                cursor.execute(query)
            return cursor, cursor.fetchall() if cursor.description else ()
        except psycopg2.Error as error:
            raise self._error(error) from error

    async def _copy(self, query: str, chunks: AsyncIterator[bytes]) -> int:
        count = 0
        async for chunk in whole_copies(chunks):
            try:
                cursor = self._conn.cursor(cursor_factory=extensions.cursor)
                cursor.copy_expert(query, BytesIO(chunk))
            except psycopg2.Error as error:
                raise self._error(error) from error
            count += cursor.rowcount
        return count
