"""Producing: put tasks into the table, alone, in bulk, or within the caller's transaction.

Invariants: what cannot be enqueued is refused before anything is sent; with `conn=` nothing is written outside the
caller's transaction; an id that was returned belongs to a row that was, or will be, committed with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, overload
from uuid import UUID

from pgtask._bulk import Source, insert_chunk
from pgtask._encode import check_delay, check_key, check_time, encode, lane_of
from pgtask._fastpath import CopyRows
from pgtask._ids import TaskIds, first_id
from pgtask._postgres.connection import map_errors
from pgtask._postgres.embedded import start
from pgtask._postgres.ends import Ends
from pgtask._postgres.migrate import migrate
from pgtask._postgres.pools import client_pool
from pgtask._postgres.store import statement
from pgtask.app import App
from pgtask.config import DEFAULT_MAX_STEP_BYTES, load_config
from pgtask.consumer import Consumer
from pgtask.errors import EnqueueError
from pgtask.policy import DEFAULT_QUEUE
from pgtask.runs import Runs
from pgtask.task import Task

__all__ = ["Client"]

CHUNK_BYTES = 128 * 1024
CHUNK_TASKS = 1000


class Client(Runs):
    """Enqueues tasks, and triggers workflows and looks after their runs.

        async with Client("postgresql:///app") as client:
            task_id = await client.enqueue(ReadName("name.txt"))

    Without a DSN: `PGTASK_DSN`, `DATABASE_URL`, `[tool.pgtask] dsn`, else the embedded server under `.pgtask/`.
    With `PGTASK_NO_LISTEN` (or its twin in the file) it uses no session state, for a transaction-pooling pgbouncer.
    It owns a pool of up to `pool_size` connections; use one client per process, from one event loop. `app` is for
    `consumer` alone: it decodes the steps.

    What enqueues takes `queue` and `priority` (default: the policy of the step), `key` (at most one task with this key
    is in the table, waiting, running or parked: if there is one, its id is returned and nothing is inserted) and `conn`
    (an asyncpg connection: the task is part of its transaction; the client need not be open for it).

    They raise `EnqueueError` (a ValueError) for what cannot be enqueued, before anything is sent; `SchemaError`
    without the table; `DataRefused` when a constraint or a trigger of yours on the table says no; `DatabaseRefused`
    without the privilege, or in a transaction that has failed; `RowsLocked` when your `lock_timeout` is over; and
    `DatabaseUnavailable`, of which that is one, when the connection is lost: a single task may then have been
    enqueued or not, which a `key` makes safe to repeat. Cancelling them rolls back.

    Opening raises `ConfigError` for a wrong setting, `EmbeddedError` if the embedded server does not start,
    `SchemaError` if there is no table or one of another version, and `DatabaseRefused` or `DatabaseUnavailable` if the
    database cannot be connected to.
    """

    def __init__(
        self,
        dsn: str | None = None,
        *,
        app: App | None = None,
        pool_size: int = 10,
        max_step_bytes: int = DEFAULT_MAX_STEP_BYTES,
    ) -> None:
        self._dsn = dsn
        self._app = app
        self._pool_size = pool_size
        self._max_step_bytes = max_step_bytes
        self._pool: Any = None

    async def __aenter__(self) -> Client:
        config = load_config()
        if self._dsn is None and config.dsn is None:
            self._dsn = await asyncio.to_thread(start, Path.cwd())
            await migrate(self._dsn)
        self._dsn = self._dsn or config.dsn
        self._listens = config.listen
        self._pool = await client_pool(self.dsn, size=self._pool_size, pooled=not self._listens)
        return self

    @property
    def dsn(self) -> str:
        """The database that this client uses; known once the client is open."""
        if self._dsn is None:
            raise EnqueueError("the client is not open; use it as: async with Client() as client")
        return self._dsn

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pool, self._pool = self._pool, None
        if self._ends is not None:
            await self._ends.close()
            self._ends = None
        await pool.close()

    async def enqueue(
        self,
        step: Task,
        *,
        queue: str | None = None,
        priority: int | None = None,
        key: str | None = None,
        conn: Any = None,
    ) -> UUID:
        """Enqueue a task that starts at `step`, due now; its id. Raises what the class says."""
        return await self._insert(step, None, None, queue, priority, key, conn)

    async def delay(
        self,
        step: Task,
        delay: timedelta,
        *,
        queue: str | None = None,
        priority: int | None = None,
        key: str | None = None,
        conn: Any = None,
    ) -> UUID:
        """Enqueue a task that is due after `delay`, by the database's clock; its id. Raises what the class says."""
        return await self._insert(step, None, check_delay(delay), queue, priority, key, conn)

    async def schedule(
        self,
        step: Task,
        at: datetime,
        *,
        queue: str | None = None,
        priority: int | None = None,
        key: str | None = None,
        conn: Any = None,
    ) -> UUID:
        """Enqueue a task that is due at a time; at once if that has passed; its id.

            await client.schedule(ReadName("name.txt"), at=datetime(2026, 12, 24, 18, tzinfo=timezone.utc))

        Raises `EnqueueError` if `at` has no time zone, and what the class says.
        """
        return await self._insert(step, check_time(at), None, queue, priority, key, conn)

    @overload
    async def enqueue_many(
        self,
        steps: Iterable[Task] | AsyncIterable[Task],
        *,
        queue: str | None = None,
        priority: int | None = None,
        key: None = None,
        conn: Any = None,
    ) -> TaskIds: ...
    @overload
    async def enqueue_many(
        self,
        steps: Iterable[Task] | AsyncIterable[Task],
        *,
        queue: str | None = None,
        priority: int | None = None,
        key: Callable[[Any], str],
        conn: Any = None,
    ) -> list[UUID]: ...
    async def enqueue_many(
        self,
        steps: Iterable[Task] | AsyncIterable[Task],
        *,
        queue: str | None = None,
        priority: int | None = None,
        key: Callable[[Any], str] | None = None,
        conn: Any = None,
    ) -> Sequence[UUID]:
        """Enqueue all steps of an iterable, plain or async, due now, in one transaction; their ids in its order.

        Streams by COPY: memory stays constant for any number of tasks, the ids included (`TaskIds` is a range). With
        `key`, a function that gives each step's key, tasks are inserted a thousand at a time and the ids are a list.
        Raises what the class says, and what the iterable or `key` raises; then nothing is enqueued.
        """
        if key is not None and not callable(key):
            raise EnqueueError(f"enqueue_many(key={key!r}) must be a function that returns the key of each step")
        source = Source(steps, key)
        async with self._connection(conn) as connection:
            try:
                with map_errors():
                    async with connection.transaction():  # a savepoint in the caller's: a refusal does not spoil that
                        if key is None:
                            return await self._copy(connection, source, queue, priority)
                        return await self._insert_keyed(connection, source, queue, priority)
            except Exception:
                if source.error is not None:
                    raise source.error from None
                raise

    def consumer(
        self, queue: str | Iterable[str] = DEFAULT_QUEUE, *, lease_timeout: timedelta = timedelta(seconds=60)
    ) -> Consumer:
        """Take the tasks of a queue, or of several, by hand: see `Consumer`.

        `lease_timeout` is how long a task waits when this process dies. Raises `ConsumeError` for a wrong argument.
        """
        return Consumer(self.dsn, queue, app=self._app, lease_timeout=lease_timeout, pooled=not self._listens)

    # --- one

    async def _insert(
        self,
        step: Task,
        at: datetime | None,
        delay: float | None,
        queue: str | None,
        priority: int | None,
        key: str | None,
        conn: Any,
    ) -> UUID:
        codec, payload = encode(step, self._max_step_bytes)
        lane = lane_of(step, queue, priority)
        text = (codec.prefix + payload + b"}}").decode()
        if key is not None:
            check_key(key)
        async with self._connection(conn) as connection:
            while True:
                task_id = UUID(int=first_id())
                with map_errors():
                    found = await connection.fetchval(statement("enqueue"), task_id, text, at, delay, *lane, key)
                if found is None:
                    with map_errors():
                        found = (await connection.fetchrow(statement("find_keys"), [key]) or (None, None))[1]
                if found is not None:
                    return UUID(int=found.int)
                # The task with this key was finished in between: there is room for ours now.

    @asynccontextmanager
    async def _connection(self, conn: Any) -> AsyncIterator[Any]:
        """The caller's connection as it is, or one of ours."""
        if conn is not None:
            if not hasattr(conn, "copy_to_table"):
                raise EnqueueError(f"conn={conn!r:.80} is not an asyncpg connection")
            yield conn
            return
        if self._pool is None:
            raise EnqueueError("the client is not open; use it as: async with Client() as client")
        pool = self._pool
        with map_errors():
            connection = await pool.acquire()
        try:
            yield connection
        finally:
            await pool.release(connection)

    def _open_ends(self) -> Ends:
        return Ends(self.dsn, self._fetch, listens=self._listens)

    async def _fetch(self, query: str, *args: Any) -> list[Any]:
        async with self._connection(None) as connection:
            rows: list[Any] = await connection.fetch(query, *args)
            return rows

    # --- many

    async def _copy(self, connection: Any, source: Source, queue: str | None, priority: int | None) -> TaskIds:
        first = UUID(int=first_id())
        rows = CopyRows(first.int)

        async def chunks() -> AsyncIterator[bytes]:
            async for step, _ in source:
                codec, payload = encode(step, self._max_step_bytes)
                name, level = lane_of(step, queue, priority)
                if rows.add(codec, payload, name.encode(), level) >= CHUNK_BYTES:
                    yield rows.take()
            yield rows.take() + CopyRows.TRAILER

        await connection.copy_to_table(
            "pg_task", source=chunks(), columns=["id", "step", "queue", "priority"], format="binary"
        )
        return TaskIds(first, rows.count)

    async def _insert_keyed(
        self, connection: Any, source: Source, queue: str | None, priority: int | None
    ) -> list[UUID]:
        ids: list[UUID] = []
        keys: list[str] = []
        chunk: dict[str, tuple[str, str, int]] = {}
        async for step, key in source:
            codec, payload = encode(step, self._max_step_bytes)
            keys.append(check_key(key))
            chunk.setdefault(keys[-1], ((codec.prefix + payload + b"}}").decode(), *lane_of(step, queue, priority)))
            if len(chunk) >= CHUNK_TASKS:
                ids += await insert_chunk(connection, keys, chunk)
                keys, chunk = [], {}
        return ids + await insert_chunk(connection, keys, chunk)
