"""The door to the connections of Django, on psycopg 3 or psycopg2.

Invariant: each statement goes through Django's cursor, so Django counts and logs it, and its wrappers see it. A COPY
goes to the driver's connection, once a savepoint has begun the transaction.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import asyncpg
from django.db import Error, InterfaceError, OperationalError, connections
from django.db.transaction import TransactionManagementError

from pgtask._doors import door_to
from pgtask._doors.door import Door, as_named_text, raise_outside, server_error
from pgtask._placeholders import translate
from pgtask.errors import EnqueueError

__all__ = ["open_door"]


def open_door(conn: Any) -> Door:
    if not (hasattr(conn, "vendor") and hasattr(conn, "in_atomic_block")):
        raise EnqueueError(
            f"conn= is a {type(conn).__name__} of Django; pass django.db.connection, or connections[NAME]"
        )
    return _DjangoDoor(connections[conn.alias] if type(conn).__name__ == "ConnectionProxy" else conn)


class _DjangoDoor(Door):
    def __init__(self, conn: Any) -> None:
        self._conn = conn

    def check(self) -> None:
        if _in_event_loop():
            raise EnqueueError(
                "conn= is Django's connection, which Django forbids to use in an event loop: call a SyncClient in the "
                "function that you pass to sync_to_async"
            )
        if self._conn.vendor != "postgresql":
            raise EnqueueError(
                f"conn= is Django's connection {self._conn.alias!r} to {self._conn.vendor}, not to Postgres"
            )
        try:
            self._conn.validate_thread_sharing()
            if not (self._conn.in_atomic_block or not self._conn.get_autocommit()):
                raise_outside("call this within transaction.atomic()")
        except OperationalError as error:
            raise server_error(error.__cause__ or error, is_lost=True) from error
        except Error as error:
            raise EnqueueError(f"conn= cannot be used: {error}") from error

    def is_closed(self) -> bool:
        return self._conn.connection is None or bool(self._conn.connection.closed)

    @contextmanager
    def _cursor(self) -> Iterator[Any]:
        try:
            with self._conn.cursor() as cursor:
                yield cursor
        except TransactionManagementError as error:  # an error has broken the block
            raise asyncpg.PostgresError.new({"C": "25P02", "M": str(error)}) from error
        except Error as error:
            is_lost = self.is_closed() or isinstance(error, (InterfaceError, OperationalError))
            raise server_error(error.__cause__ or error, is_lost=is_lost) from error

    async def _fetch(self, query: str, args: Sequence[Any]) -> tuple[Any, Sequence[Sequence[Any]]]:
        with self._cursor() as cursor:
            if args:
                cursor.execute(translate(query, "pyformat")[0], as_named_text(args))
            else:
                cursor.execute(query)
            described = SimpleNamespace(description=cursor.description)  # the cursor forgets it when it is closed
            return described, cursor.fetchall() if described.description else ()

    async def copy_to_table(
        self, table: str, *, source: AsyncIterator[bytes], columns: Sequence[str], format: str
    ) -> str:
        driver: Any = door_to(self._conn.connection)
        status: str = await driver.copy_to_table(table, source=source, columns=columns, format=format)
        return status


def _in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return not os.environ.get("DJANGO_ALLOW_ASYNC_UNSAFE")
