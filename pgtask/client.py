"""The client: enqueues tasks and triggers runs, alone, in bulk, or within the caller's transaction.

Invariants: a step or an input that no worker could run is refused before anything is sent; with `conn=` nothing is
written outside the caller's transaction; an id that was returned belongs to a row that was, or will be, committed with
it. A client loads nothing of a worker: neither `_worker` nor `_consumer`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, overload
from uuid import UUID

from pgtask._client_runs import ClientRuns
from pgtask._client_store import ClientStore
from pgtask._copy import Source
from pgtask._ids import TaskId, TaskIds
from pgtask._placement import (
    KEEP,
    KeyRule,
    OnConflict,
    OnParked,
    Placement,
    check_expires,
    make_key_rule,
    scoped_key,
)
from pgtask._postgres.client_store import PostgresStore
from pgtask._postgres.embedded import start
from pgtask._postgres.failures import ParkedTask
from pgtask._postgres.migrate import migrate
from pgtask._project import project_directory
from pgtask._traces import sending
from pgtask._validate import (
    ItemEncoder,
    NewRow,
    check_delay,
    check_task_id,
    check_time,
    encode_step,
    name_of,
)
from pgtask._wrong_with import AsyncWithOnly
from pgtask.app import App
from pgtask.config import DEFAULT_MAX_STEP_BYTES, client_config
from pgtask.errors import EnqueueError
from pgtask.groups import Group, GroupHandle, check_group, check_name, new_group
from pgtask.outcome import Enqueue
from pgtask.policy import DEFAULT_QUEUE
from pgtask.task import Task
from pgtask.tasks import Family, Statistics, TaskHandle, Tasks, TaskState, choose_tasks

if TYPE_CHECKING:
    from pgtask.consumer import Consumer

__all__ = ["Client"]

InputT = TypeVar("InputT")
OutputT = TypeVar("OutputT")


class Client(ClientRuns, AsyncWithOnly):
    """Enqueues tasks, and triggers workflows and looks after their runs.

        async with Client("postgresql:///app") as client:
            task_id = await client.enqueue(ReadName("name.txt"))

    Without a DSN: `PGTASK_DSN`, `[tool.pgtask] dsn`, `DATABASE_URL`, else the embedded server under `.pgtask/`.
    With `PGTASK_NO_LISTEN` (or its twin in the file) it uses no session state, for a transaction-pooling pgbouncer.
    In a worker, without a DSN, it uses the database of the supervisor, whatever the environment says. It owns a pool of
    up to `pool_size` connections; use one client per process, in the event loop that it was opened in. `app` is for
    `consumer` alone: it decodes the steps.

    The methods that enqueue take

    - `queue` and `priority`; by default those of the policy of the step.
    - `key`: at most one task of this name with this key waits, runs or is parked in the table. If there is one,
      `on_conflict` and `on_parked` say what to do. What is returned is the id of the task that has the step now, and
      its `outcome` says what became of your step; its `is_new` is False if that is the other one.
    - `on_conflict`: `"keep"` leaves the other task as it is. With `"replace"` one that waits takes the new step, lane
      and times. With `"after"`, one that waits at the very same step is enough. In both cases, if the other task runs,
      the new one waits behind it, and starts when that has left the table; if one waits there already, that takes the
      new step. So a step that starts after the call sees what you have written before it, or in its transaction.
    - `on_parked`: what to do if the other task is parked: `"keep"` it, `"revive"` it at the step where it was parked,
      or `"replace"` it by the new step.
    - `debounce`: the task is due when this time has passed without another call with its key; each call gives it the
      new step. `ceiling`: but not later than this time after the first call.
    - `expires`: no worker starts the task after this time, or after this time from now. It leaves the table, or is
      parked, as its policy says (`on_expired`). A task that has begun does not expire.
    - `conn`: your connection in a transaction, of asyncpg, psycopg, psycopg2, SQLAlchemy (or its session) or Django.
      The task is part of that. The client need not be open. A sync connection blocks the event loop.

    They raise

    - `EnqueueError` (a ValueError), before anything is sent, for a value that cannot be enqueued, and for a `conn` that
      is in no transaction.
    - `SchemaError` without the table; `DatabaseRefused` without the privilege, or in a transaction that has failed.
    - `DataRefused` when a constraint, trigger, rule or policy of yours on the table refuses the row or drops it.
    - `RowsLocked`, a `DatabaseUnavailable`, when your `lock_timeout` expires or your transaction meets a deadlock.
    - `DatabaseUnavailable` when the connection is lost. A single task may then have been enqueued or not; a `key` makes
      it safe to repeat the call. The same holds when you cancel the call.

    Opening raises `ConfigError` for a wrong setting, `EmbeddedError` if the embedded server does not start,
    `SchemaError` if there is no table or one of another version, and `DatabaseRefused` or `DatabaseUnavailable` if the
    database cannot be connected to.
    """

    _sync_twin = "SyncClient"

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
        self._postgres = PostgresStore()
        self._store: ClientStore = self._postgres

    async def open(self) -> Self:
        """Open the client in the running event loop, as `async with` does; for a notebook or the start of a framework.
        Close it by `close`."""
        if self._postgres.is_open:
            raise EnqueueError("the client is open already; open it once, or make another one")
        config = client_config(self._dsn)
        if self._dsn is None and config.dsn is None:
            self._dsn = await asyncio.to_thread(start, project_directory())
            await migrate(self._dsn)
        self._dsn = self._dsn or config.dsn
        await self._postgres.open(self.dsn, size=self._pool_size, listens=config.listen)
        return self

    async def close(self) -> None:
        """Close the client, in the event loop in which it was opened."""
        await self._postgres.close()

    async def __aenter__(self) -> Self:
        return await self.open()

    @property
    def dsn(self) -> str:
        """The database that this client uses; known once the client is open."""
        if self._dsn is None:
            raise EnqueueError("the client is not open; use it as: async with Client() as client")
        return self._dsn

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def enqueue(
        self,
        step: Task,
        *,
        queue: str | None = None,
        priority: int | None = None,
        key: str | None = None,
        on_conflict: OnConflict = "keep",
        on_parked: OnParked = "keep",
        debounce: timedelta | None = None,
        ceiling: timedelta | None = None,
        expires: timedelta | datetime | None = None,
        conn: Any = None,
    ) -> TaskId:
        """Enqueue a task that starts at `step`, due now, and return its id. See the class for errors."""
        rule = make_key_rule(key, on_conflict, on_parked, debounce, ceiling)
        return await self._insert(step, (None, None), queue, priority, key, rule, expires, conn)

    async def delay(
        self,
        step: Task,
        delay: timedelta,
        *,
        queue: str | None = None,
        priority: int | None = None,
        key: str | None = None,
        on_conflict: OnConflict = "keep",
        on_parked: OnParked = "keep",
        expires: timedelta | datetime | None = None,
        conn: Any = None,
    ) -> TaskId:
        """Enqueue a task that is due after `delay`, by the database's clock, and return its id. See the class for
        errors."""
        rule = make_key_rule(key, on_conflict, on_parked, None, None)
        return await self._insert(step, (None, check_delay(delay)), queue, priority, key, rule, expires, conn)

    async def schedule(
        self,
        step: Task,
        at: datetime,
        *,
        queue: str | None = None,
        priority: int | None = None,
        key: str | None = None,
        on_conflict: OnConflict = "keep",
        on_parked: OnParked = "keep",
        expires: timedelta | datetime | None = None,
        conn: Any = None,
    ) -> TaskId:
        """Enqueue a task that is due at a time, at once if that has passed, and return its id.

            await client.schedule(ReadName("name.txt"), at=datetime(2026, 12, 24, 18, tzinfo=timezone.utc))

        Raises `EnqueueError` if `at` has no time zone. See the class for the other errors.
        """
        rule = make_key_rule(key, on_conflict, on_parked, None, None)
        return await self._insert(step, (check_time(at), None), queue, priority, key, rule, expires, conn)

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
        steps: Iterable[Task | Enqueue] | AsyncIterable[Task | Enqueue],
        *,
        queue: str | None = None,
        priority: int | None = None,
        key: None = None,
        expires: timedelta | datetime | None = None,
        conn: Any = None,
    ) -> Sequence[UUID]: ...
    @overload
    async def enqueue_many(
        self,
        steps: Iterable[Task | Enqueue] | AsyncIterable[Task | Enqueue],
        *,
        queue: str | None = None,
        priority: int | None = None,
        key: Callable[[Any], str],
        on_conflict: OnConflict = "keep",
        on_parked: OnParked = "keep",
        debounce: timedelta | None = None,
        ceiling: timedelta | None = None,
        expires: timedelta | datetime | None = None,
        conn: Any = None,
    ) -> list[TaskId]: ...
    async def enqueue_many(
        self,
        steps: Iterable[Task | Enqueue] | AsyncIterable[Task | Enqueue],
        *,
        queue: str | None = None,
        priority: int | None = None,
        key: Callable[[Any], str] | None = None,
        on_conflict: OnConflict = "keep",
        on_parked: OnParked = "keep",
        debounce: timedelta | None = None,
        ceiling: timedelta | None = None,
        expires: timedelta | datetime | None = None,
        conn: Any = None,
    ) -> Sequence[UUID]:
        """Enqueue all steps of an iterable, plain or async, due now, in one transaction; returns their ids in order.

        An item may be an `Enqueue`, with a queue, a priority, a time and a key of its own. Such a key keeps the other
        task; the rules of this call are for `key`.

        Streams by COPY: memory stays constant for any number of plain steps, the ids included (`TaskIds` is a range).
        Items with a time of their own are inserted a thousand at a time, and those with keys at the end. With `key`, a
        function that gives the key of each item, all are read before they are inserted in the order of their keys;
        of items with the same key the first one counts.
        Passes on exceptions of the iterable and of `key`; then nothing is enqueued. See the class for errors.
        """
        if key is not None and not callable(key):
            raise EnqueueError(f"enqueue_many(key={key!r}) must be a function that returns the key of each step")
        if key is None and (on_conflict, on_parked, debounce) != ("keep", "keep", None):
            raise EnqueueError(
                "on_conflict, on_parked and debounce need key=, a function that returns the key of each item; a key of "
                "an item itself keeps the other task"
            )
        rule = make_key_rule(key, on_conflict, on_parked, debounce, ceiling)
        source = Source(steps, key)
        self._store.check_connection(conn)  # before anything is read
        encode = ItemEncoder(queue, priority, check_expires(expires), rule, self._max_step_bytes)
        try:
            with sending(queue or DEFAULT_QUEUE, None) as span:
                insert = self._store.copy_tasks if key is None else self._store.insert_keyed_tasks
                ids = await insert(source, encode, conn)
                if span is not None:
                    span.set_attribute("messaging.batch.message_count", len(ids))
                return ids
        except Exception:
            if source.error is not None:
                raise source.error from None
            raise

    def consumer(
        self, queue: str | Iterable[str] = DEFAULT_QUEUE, *, lease_timeout: timedelta = timedelta(seconds=60)
    ) -> Consumer:
        """Take the tasks of a queue, or of several, by hand: see `Consumer`.

        `lease_timeout` bounds the time that a task waits when this process dies. Raises `ConsumeError` for a wrong
        argument.
        """
        from pgtask.consumer import Consumer  # loads a part of the worker, which a producer does not need

        dsn = self.dsn
        self._postgres.check_open()
        return Consumer(dsn, queue, app=self._app, lease_timeout=lease_timeout, pooled=not self._postgres.listens)

    def failures(self) -> AsyncGenerator[ParkedTask, None]:
        """Yield the tasks that are parked from now on, without end: `async for parked in client.failures()`.

        Listens on a connection of its own. When that is lost it opens another one, and then yields the tasks that were
        parked meanwhile and still are. Raises `ConfigError` with `PGTASK_NO_LISTEN`, and `DatabaseRefused`.
        """
        return self._store.follow_failures()

    # --- groups of tasks

    async def start(
        self,
        group: Group,
        steps: Iterable[Task | Enqueue] | AsyncIterable[Task | Enqueue],
        *,
        queue: str | None = None,
        priority: int | None = None,
        conn: Any = None,
    ) -> GroupHandle:
        """Start a group: enqueue all steps of an iterable as its members, due now, in one transaction. Return its
        handle.

        Streams as `enqueue_many` does, whose items it takes: memory stays constant for any number of plain steps. The
        tasks that a member enqueues in its outcome are members too. A step whose key another task has is no member.
        A group without members ends at once. Raises `EnqueueError` if there is a group with this name, and what
        `enqueue_many` raises.
        """
        new = new_group(check_group(group), self._max_step_bytes)
        source = Source(steps, None)
        self._store.check_connection(conn)  # before anything is read
        encode = ItemEncoder(queue, priority, (None, None), KEEP, self._max_step_bytes)
        try:
            with sending(queue or DEFAULT_QUEUE, None) as span:
                total = await self._store.groups.start_group(new, source, encode, conn)
                if span is not None:
                    span.set_attribute("messaging.batch.message_count", total)
        except Exception:
            if source.error is not None:
                raise source.error from None
            raise
        return self.group(group.name)

    def group(self, name: str) -> GroupHandle:
        """Return a group by its name, without I/O. Raises `EnqueueError` for what is no name."""
        return GroupHandle(self._store.groups, self._store.tasks, check_name(name))

    # --- tasks in the table

    def task(self, id: UUID | str) -> TaskHandle:
        """Return a task by its id, without I/O. Raises `EnqueueError` if the id is not a UUID, nor the text of one."""
        return TaskHandle(self._store.tasks, check_task_id(id))

    def tasks(
        self,
        *,
        queue: str | None = None,
        task: Family | None = None,
        step: str | type[Task] | None = None,
        state: TaskState | Iterable[TaskState] | None = None,
        error: str | None = None,
        older_than: timedelta | None = None,
        key: str | None = None,
        where: Mapping[str, object] | None = None,
        group: str | None = None,
    ) -> Tasks:
        """Choose tasks of the table, without I/O: all that meet each argument. See `Tasks` for what it does with them.

            await client.tasks(step=ReadName, error="FileNotFoundError%").retry()

        - `task`, `step`: the class, or the name as in the row: `Greeter`, `ReadName` or `Greeter.ReadName`.
        - `state`: `ready`, `scheduled`, `leased`, `parked`, or several of them.
        - `error`: a pattern of SQL LIKE; it chooses parked tasks.
        - `older_than`: tasks that fell due, or were parked, longer ago than that.
        - `where`: fields of the step and their values, as `{"customer": 42, "address.city": "Bern", "items.0": "x"}`.
        - `group`: the name of a group; its members come in the order of their ids, parked ones first.

        A group, a state, a key, and with them a queue or an age, are read from an index. Other arguments are compared
        with each row that these leave. Raises `EnqueueError` for a wrong argument.
        """
        wanted = choose_tasks(
            queue=queue,
            task=task,
            step=step,
            state=state,
            error=error,
            older_than=older_than,
            key=key,
            where=where,
            group=group,
        )
        return Tasks(self._store.tasks, wanted)

    async def stats(self) -> Statistics:
        """Count the tasks of each queue and priority by state, and measure the table, as `pgtask stats` does. The cost
        does not grow with the table: no count goes further than 100,000."""
        return await self._store.tasks.read_statistics()

    async def _insert(
        self,
        step: Task,
        due: tuple[datetime | None, float | None],
        queue: str | None,
        priority: int | None,
        key: str | None,
        rule: KeyRule,
        expires: timedelta | datetime | None,
        conn: Any,
    ) -> TaskId:
        codec, payload, lane = encode_step(queue, priority, self._max_step_bytes, step)
        stored = None if key is None else scoped_key(name_of(step), key)
        place = Placement(*lane, *due, stored, rule, *check_expires(expires, *due))
        with sending(place.queue, codec.label) as span:
            id = await self._store.insert_task(NewRow(codec, payload, place), conn)
            if span is not None:
                span.set_attribute("messaging.message.id", str(id))
        return id
