"""The tables of a client in Postgres: its pool of connections, and one method for each of its statements.

Invariants: with a connection of the caller nothing is written outside of the caller's transaction; an id that is
returned belongs to a row that was, or will be, committed with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from typing import Any, TypeVar
from uuid import UUID

import asyncpg

from pgtask._copy import Source
from pgtask._doors import Door
from pgtask._ids import TaskId, TaskIds, ids_of_keys
from pgtask._postgres.bulk import insert_many
from pgtask._postgres.connection import became_read_only, map_errors
from pgtask._postgres.failures import ParkedTask, follow_failures
from pgtask._postgres.groups import PostgresGroups
from pgtask._postgres.inserts import insert_run, insert_runs, insert_task
from pgtask._postgres.many_inserts import insert_keyed
from pgtask._postgres.pools import client_pool, release_quietly
from pgtask._postgres.run_results import ResultWaiter
from pgtask._postgres.runs import RunStatus, cancel_runs, list_runs, read_statuses, resume_runs, send_signal
from pgtask._postgres.task_store import PostgresTasks
from pgtask._postgres.tasks import retry_on_deadlock
from pgtask._postgres.transactions import atomically, open_caller, refuse_read_only
from pgtask._validate import ItemEncoder, NewRow
from pgtask.errors import EnqueueError
from pgtask.workflow import RunState

__all__ = ["PostgresStore"]

T = TypeVar("T")

CHUNK_RUNS = 1000  # runs in a statement


class PostgresStore:
    """The statements of one client. Without a connection of the caller each needs the store to be open."""

    def __init__(self) -> None:
        self.listens = True
        """Whether it may LISTEN, and use other state of a session."""
        self._dsn = ""
        self._owns_pool = True
        self._pool: Any = None
        self._spare: Any = None  # a connection of the pool that the last call has left
        self._waiting = 0  # calls that wait for the pool; while there are any, no connection is spared
        self._loop: asyncio.AbstractEventLoop | None = None
        self._results: ResultWaiter | None = None
        self.tasks = PostgresTasks(self.connection)
        """The tasks that are in the table."""
        self.groups = PostgresGroups(self.connection)
        """The groups."""

    # --- connections

    async def open(self, dsn: str, *, size: int, listens: bool) -> None:
        self.listens = listens
        self._dsn = dsn
        self._pool = await client_pool(dsn, size=size, pooled=not listens)
        self._loop = asyncio.get_running_loop()

    def use_pool(self, pool: Any, dsn: str, *, listens: bool) -> None:
        """Open the store on a pool of another owner, whose sessions have none of our settings. Call it on the loop."""
        self.listens = listens
        self._dsn = dsn
        self._owns_pool = False
        self._pool = pool
        self._loop = asyncio.get_running_loop()

    async def close(self) -> None:
        """Close the pool, unless it is of another owner."""
        self.check_connection()
        pool, self._pool = self._pool, None
        if self._spare is not None:
            spare, self._spare = self._spare, None
            await release_quietly(pool, spare)
        if self._results is not None:
            await self._results.close()
            self._results = None
        if self._owns_pool:
            await pool.close()

    @property
    def is_open(self) -> bool:
        return self._pool is not None

    def check_open(self) -> None:
        """Raise `EnqueueError` unless the store is open."""
        if self._pool is None:
            raise EnqueueError("the client is not open; use it as: async with Client() as client")

    def check_connection(self, conn: Any = None) -> None:
        """Raise `EnqueueError` unless the connection of the caller, or without one this store, can be used here."""
        if conn is not None:
            open_caller(conn)
            return
        self.check_open()
        self._check_loop()

    def _check_loop(self) -> None:
        if self._loop is not asyncio.get_running_loop():
            raise EnqueueError(
                "the client was opened in another event loop; open one in each loop, as in each asyncio.run(), and in "
                "each test that has a loop of its own"
            )

    @asynccontextmanager
    async def connection(self, conn: Any = None) -> AsyncIterator[Any]:
        """The caller's connection, through a door if it is not asyncpg's; or one of the pool."""
        if conn is not None:
            with refuse_read_only():
                yield await self._begin(conn)
            return
        self.check_connection()
        pool = self._pool
        connection = await self._acquire(pool)
        try:
            yield connection
        except BaseException as error:
            if became_read_only(error):
                await self._leave_server(pool, connection)
            await release_quietly(pool, connection)
            raise
        if self._waiting or self._spare is not None or not self._owns_pool or self._pool is not pool:
            await release_quietly(pool, connection)
        else:
            self._spare = connection

    async def _acquire(self, pool: Any) -> Any:
        """Take the spare connection, or one of the pool. A call after another one takes half the time so, as the pool
        makes an asyncio Task for each release."""
        connection, self._spare = self._spare, None
        if connection is not None:
            with suppress(asyncpg.InterfaceError):  # it was lost meanwhile
                if not connection.is_closed():
                    return connection
            await release_quietly(pool, connection)
        self._waiting += 1
        try:
            with map_errors():
                return await pool.acquire()
        finally:
            self._waiting -= 1

    async def _leave_server(self, pool: Any, connection: Any) -> None:
        """Drop a connection, and have the pool replace the others, since its server accepts no writes."""
        connection.terminate()
        if self._spare is not None:
            with suppress(asyncpg.InterfaceError):  # it was lost meanwhile
                self._spare.terminate()
        await pool.expire_connections()

    async def _begin(self, conn: Any) -> Any:
        """Return the caller's connection, or a door to it."""
        caller = open_caller(conn)
        if isinstance(caller, Door):
            with map_errors():
                await caller.begin()
        return caller

    async def _execute(self, conn: Any, work: Callable[[Any], Awaitable[T]], *, waits: bool = True) -> T:
        """Do the work in the caller's transaction; or on a connection of the pool, and then once more after a deadlock.

        `waits`: the work may wait for other sessions, and must see then what they have committed. Our sessions are set
        so; behind a pooler and on the pool of another owner, where we have none, the work gets a transaction that is.
        """
        if conn is not None:
            caller = await self._begin(conn)
            with refuse_read_only(), map_errors():
                return await work(caller)
        async with self.connection() as connection:

            async def attempt() -> T:
                if waits and not (self.listens and self._owns_pool):
                    async with atomically(connection):
                        return await work(connection)
                return await work(connection)

            with map_errors():
                return await retry_on_deadlock(connection, attempt)

    # --- tasks

    async def insert_task(self, row: NewRow, conn: Any) -> TaskId:
        waits = row.place.key is not None
        return await self._execute(conn, lambda connection: insert_task(connection, row), waits=waits)

    async def copy_tasks(self, source: Source, encode: ItemEncoder, conn: Any) -> Sequence[UUID]:
        async with self.connection(conn) as connection:
            with map_errors():
                return await insert_many(connection, source, encode)

    async def insert_keyed_tasks(self, source: Source, encode: ItemEncoder, conn: Any) -> list[TaskId]:
        """Read all steps before the first is inserted: no key is locked while the caller's iterable takes its time."""
        keys: list[str] = []
        rows: dict[str, NewRow] = {}
        async for step, key in source:
            row = encode(step, key)
            assert row.place.key is not None
            keys.append(row.place.key)
            rows.setdefault(row.place.key, row)
        found = await self._execute(conn, lambda connection: insert_keyed(connection, rows))
        return ids_of_keys(found, keys)

    def follow_failures(self) -> AsyncGenerator[ParkedTask, None]:
        self.check_open()
        return follow_failures(self._dsn, listens=self.listens, check=self._check_loop)

    # --- runs

    async def insert_run(
        self,
        name: str,
        text: str,
        at: datetime | None,
        delay: float | None,
        lane: tuple[str, int],
        key: str | None,
        conn: Any,
    ) -> TaskId:
        columns = (text, at, delay, *lane)
        return await self._execute(
            conn, lambda connection: insert_run(connection, name, columns, key), waits=key is not None
        )

    async def insert_runs(
        self, ids: TaskIds, name: str, texts: Sequence[str], lane: tuple[str, int], conn: Any
    ) -> None:
        await self._execute(conn, lambda connection: insert_runs(connection, ids, name, texts, lane, CHUNK_RUNS))

    async def read_status(self, run: UUID) -> RunStatus | None:
        async with self.connection() as connection:
            with map_errors():
                return next(iter(await read_statuses(connection, [run])), None)

    async def list_statuses(
        self, name: str | None, state: RunState | None, limit: int, before: UUID | None
    ) -> list[RunStatus]:
        async with self.connection() as connection:
            with map_errors():
                found, _ = await list_runs(connection, name=name, state=state, limit=limit, before=before)
        return found

    async def send_signal(self, run: UUID, name: str, payload: str, conn: Any) -> bool:
        return await self._execute(conn, lambda connection: send_signal(connection, run, name, payload))

    async def cancel_run(self, run: UUID, conn: Any) -> bool:
        async with self.connection(conn) as connection:
            with map_errors():
                return run in await cancel_runs(connection, [run])

    async def resume_run(self, run: UUID, conn: Any) -> bool:
        async with self.connection(conn) as connection:
            with map_errors():
                resumed = await resume_runs(connection, [run])
        if resumed.taken:
            raise EnqueueError(f"run {run} cannot be resumed: {resumed.taken[0]}")
        return bool(resumed.runs)

    async def wait_for_end(self, run: UUID) -> tuple[str, str | None, str | None]:
        self.check_connection()
        if self._results is None:
            self._results = ResultWaiter(self._dsn, self._fetch, listens=self.listens)
        return await self._results.wait(run)

    async def _fetch(self, query: str, *args: Any) -> list[Any]:
        async with self.connection() as connection:
            rows: list[Any] = await connection.fetch(query, *args)
            return rows
