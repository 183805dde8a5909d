"""The doors to connections of psycopg 3, sync and async.

Invariant: the cursors are our own, so row factories and cursor classes of the caller change nothing.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import nullcontext
from typing import Any

import psycopg
from psycopg.pq import PipelineStatus, TransactionStatus
from psycopg.rows import tuple_row

from pgtask._doors.door import Door, as_text, raise_closed, raise_outside, server_error
from pgtask.errors import EnqueueError

__all__ = ["open_door"]


def open_door(conn: Any) -> Door:
    if not hasattr(psycopg, "RawCursor"):
        raise EnqueueError(f"conn= is of psycopg {psycopg.__version__}; pgtask needs psycopg 3.2 or later")
    if isinstance(conn, psycopg.AsyncConnection):
        return _AsyncDoor(conn)
    if isinstance(conn, psycopg.Connection):
        return _SyncDoor(conn)
    if type(conn).__module__.startswith("psycopg_pool"):
        raise EnqueueError("conn= is a pool; take a connection: with pool.connection() as conn")
    raise EnqueueError(f"conn= is a {type(conn).__name__} of psycopg; pass the connection itself")


class _PsycopgDoor(Door):
    def __init__(self, conn: Any) -> None:
        self._conn = conn

    def check(self) -> None:
        if self._conn.closed:
            raise_closed()
        if not self._conn.autocommit:
            return  # its next statement begins a transaction
        status = self._conn.info.transaction_status
        if status is TransactionStatus.IDLE:
            raise_outside(
                "its autocommit is on: begin one before, with conn.transaction() (async with, if it is an "
                "AsyncConnection)"
            )
        if status is TransactionStatus.ACTIVE and not self._is_pipeline():
            raise EnqueueError(
                "conn= runs a statement of yours, and its autocommit is on, so it may be in no transaction: wait for "
                "that statement before"
            )

    @property
    def can_copy(self) -> bool:  # type: ignore[override]
        return not self._is_pipeline()

    def _is_pipeline(self) -> bool:
        return bool(self._conn.pgconn.pipeline_status != PipelineStatus.OFF)

    def is_closed(self) -> bool:
        return bool(self._conn.closed)

    def _error(self, error: psycopg.Error) -> Any:
        return server_error(error, is_lost=self._conn.closed or isinstance(error, psycopg.OperationalError))


class _SyncDoor(_PsycopgDoor):
    async def begin(self) -> None:
        if self._is_pipeline():
            with self._conn.pipeline():  # its end reads what the pipeline has sent
                pass
            self.check()

    async def _fetch(self, query: str, args: Sequence[Any]) -> tuple[Any, Sequence[Sequence[Any]]]:
        try:
            cursor = psycopg.RawCursor(self._conn, row_factory=tuple_row)
            with self._conn.pipeline() if self._is_pipeline() else nullcontext():
                cursor.execute(query.encode(), [as_text(value) for value in args] or None)
            return cursor, cursor.fetchall() if _has_rows(cursor) else ()
        except psycopg.Error as error:
            raise self._error(error) from error

    async def _copy(self, query: str, chunks: AsyncIterator[bytes]) -> int:
        try:
            cursor = psycopg.RawCursor(self._conn, row_factory=tuple_row)
            with cursor.copy(query.encode()) as copy:
                async for chunk in chunks:
                    copy.write(chunk)
            return cursor.rowcount
        except psycopg.Error as error:
            raise self._error(error) from error


class _AsyncDoor(_PsycopgDoor):
    is_async = True

    async def begin(self) -> None:
        if self._is_pipeline():
            async with self._conn.pipeline():
                pass
            self.check()

    async def _fetch(self, query: str, args: Sequence[Any]) -> tuple[Any, Sequence[Sequence[Any]]]:
        try:
            cursor = psycopg.AsyncRawCursor(self._conn, row_factory=tuple_row)
            async with self._conn.pipeline() if self._is_pipeline() else nullcontext():
                await cursor.execute(query.encode(), [as_text(value) for value in args] or None)
            return cursor, await cursor.fetchall() if _has_rows(cursor) else ()
        except psycopg.Error as error:
            raise self._error(error) from error

    async def _copy(self, query: str, chunks: AsyncIterator[bytes]) -> int:
        try:
            cursor = psycopg.AsyncRawCursor(self._conn, row_factory=tuple_row)
            async with cursor.copy(query.encode()) as copy:
                async for chunk in chunks:
                    await copy.write(chunk)
            return cursor.rowcount
        except psycopg.Error as error:
            raise self._error(error) from error


def _has_rows(cursor: Any) -> bool:
    return cursor.pgresult is not None and cursor.pgresult.nfields > 0
