"""The client of sync code: the methods of `Client`, without `await`.

Invariants: with `conn=` the statement runs in the caller's thread, on that connection; without, in one thread with an
event loop, whichever thread calls. What the caller passes (steps, keys) runs in the caller's thread. A process that was
forked has a thread and connections of its own.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar, overload
from uuid import UUID
from weakref import WeakSet

from pgtask._doors import door_to
from pgtask._feed import Feed
from pgtask._ids import TaskId, TaskIds
from pgtask._loop_thread import LoopThread, forget
from pgtask._placement import OnConflict, OnParked
from pgtask._postgres.failures import ParkedTask
from pgtask._sync_runs import SyncRuns
from pgtask._wrong_with import SyncWithOnly
from pgtask.client import Client
from pgtask.config import DEFAULT_MAX_STEP_BYTES
from pgtask.errors import EnqueueError
from pgtask.groups import Group
from pgtask.outcome import Enqueue
from pgtask.sync_handles import SyncGroupHandle, SyncTaskHandle, SyncTasks
from pgtask.task import Task
from pgtask.tasks import Family, Statistics, TaskState

__all__ = ["SyncClient"]

T = TypeVar("T")
InputT = TypeVar("InputT")
OutputT = TypeVar("OutputT")

EXIT_TIMEOUT = 2.0  # seconds

_clients: WeakSet[SyncClient] = WeakSet()


class SyncClient(SyncRuns, SyncWithOnly):
    """Does what `Client` does, for sync code and threads: the same methods, arguments and errors.

        with SyncClient("postgresql:///app") as client:
            task_id = client.enqueue(ReadName("name.txt"))

    All threads may share it: make one in each process. One thread of its own holds the connections. After a fork it
    opens again in the child, with the first call.

    - `conn`: your connection in a transaction, of psycopg, psycopg2, SQLAlchemy (sync) or Django. The statement runs on
      it in your thread, and the client need not be open.
    - It may be called in the thread of an event loop, and then blocks that loop; use `Client` there.
    """

    def __init__(
        self, dsn: str | None = None, *, pool_size: int = 10, max_step_bytes: int = DEFAULT_MAX_STEP_BYTES
    ) -> None:
        self._make = partial(Client, dsn, pool_size=pool_size, max_step_bytes=max_step_bytes)
        self._client = self._make()
        self._thread: LoopThread | None = None
        self._is_copy = False  # of an open client, in a forked process
        self._lock = threading.Lock()
        _clients.add(self)

    # --- its life

    def open(self) -> Self:
        """Open the client, as `with` does. Close it by `close`."""
        with self._lock:
            if self._thread is not None or self._is_copy:
                raise EnqueueError("the client is open already; open it once, or make another one")
            self._open()
        return self

    def close(self) -> None:
        """Close the client. Calls that are under way in other threads end first."""
        with self._lock:
            thread, self._thread = self._thread, None
            was_copy, self._is_copy = self._is_copy, False
        if thread is None:
            if was_copy:
                return
            raise _not_open()
        try:
            thread.run(self._client.close())
        finally:
            thread.stop()

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def dsn(self) -> str:
        """The database that this client uses; known once the client is open."""
        return self._client.dsn

    def _open(self) -> LoopThread:
        """Start the thread, and open a client in it."""
        thread = LoopThread("pgtask client")
        try:
            thread.run(self._client.open())
        except BaseException:
            thread.stop()
            raise
        self._thread, self._is_copy = thread, False
        return thread

    def _opened(self) -> LoopThread:
        """Return the thread; a new one in a forked process."""
        thread = self._thread
        if thread is None:
            with self._lock:
                thread = self._thread
                if thread is None:
                    if not self._is_copy:
                        raise _not_open()
                    thread = self._open()
        if thread.is_here():
            raise EnqueueError("a SyncClient is called in its own thread, where it would wait for itself")
        return thread

    def _forget_parent(self) -> None:
        """Leave the thread and the connections of the parent alone."""
        self._lock = threading.Lock()
        if self._thread is not None:
            forget(self._thread, self._client)
            self._thread, self._is_copy = None, True
        self._client = self._make()

    def _end(self) -> None:
        """End the thread at the exit of the interpreter."""
        if self._thread is not None:
            thread, self._thread = self._thread, None
            with suppress(Exception):
                thread.run(_close_soon(self._client))
            thread.stop()

    def _call(self, call: Callable[[Any], Coroutine[Any, Any, T]], conn: Any = None) -> T:
        """Run a call of the client, which gets the connection: here on that of the caller, else in the thread."""
        if conn is None:
            thread = self._opened()  # in a copy, it makes the client anew
            return thread.run(call(None))
        door = door_to(conn)
        if door is None or door.is_async:
            kind = "an async connection" if door is not None or hasattr(conn, "copy_to_table") else "no connection"
            raise EnqueueError(
                f"conn={conn!r:.80} is {kind}; a SyncClient takes a sync one of psycopg, psycopg2, SQLAlchemy or "
                "Django; for an async one use Client"
            )
        return run_to_end(call(door))

    # --- tasks

    def enqueue(
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
        """Enqueue a task, due now, and return its id: `Client.enqueue`."""
        options: dict[str, Any] = {"queue": queue, "priority": priority, "key": key, "expires": expires}
        options |= {"on_conflict": on_conflict, "on_parked": on_parked, "debounce": debounce, "ceiling": ceiling}
        return self._call(lambda conn: self._client.enqueue(step, conn=conn, **options), conn)

    def delay(
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
        """Enqueue a task that is due after `delay`, and return its id: `Client.delay`."""
        options: dict[str, Any] = {"queue": queue, "priority": priority, "key": key, "expires": expires}
        options |= {"on_conflict": on_conflict, "on_parked": on_parked}
        return self._call(lambda conn: self._client.delay(step, delay, conn=conn, **options), conn)

    def schedule(
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
        """Enqueue a task that is due at a time, and return its id: `Client.schedule`."""
        options: dict[str, Any] = {"queue": queue, "priority": priority, "key": key, "expires": expires}
        options |= {"on_conflict": on_conflict, "on_parked": on_parked}
        return self._call(lambda conn: self._client.schedule(step, at, conn=conn, **options), conn)

    @overload
    def enqueue_many(
        self,
        steps: Iterable[Task],
        *,
        queue: str | None = None,
        priority: int | None = None,
        key: None = None,
        conn: Any = None,
    ) -> TaskIds: ...
    @overload
    def enqueue_many(
        self,
        steps: Iterable[Task | Enqueue],
        *,
        queue: str | None = None,
        priority: int | None = None,
        key: None = None,
        expires: timedelta | datetime | None = None,
        conn: Any = None,
    ) -> Sequence[UUID]: ...
    @overload
    def enqueue_many(
        self,
        steps: Iterable[Task | Enqueue],
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
    def enqueue_many(
        self,
        steps: Iterable[Task | Enqueue],
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
        """Enqueue all steps of a plain iterable in one transaction, and return their ids: `Client.enqueue_many`."""
        if not isinstance(steps, Iterable):
            raise EnqueueError(f"a SyncClient takes a plain iterable of steps, not {steps!r:.80}")
        options: dict[str, Any] = {"queue": queue, "priority": priority, "expires": expires}
        options |= {"on_conflict": on_conflict, "on_parked": on_parked, "debounce": debounce, "ceiling": ceiling}
        if conn is not None or (key is not None and not callable(key)):  # the latter raises there
            return self._call(lambda conn: self._client.enqueue_many(steps, key=key, conn=conn, **options), conn)
        thread = self._opened()
        feed = Feed(steps, key)
        call = self._client.enqueue_many(feed.steps(), key=None if key is None else feed.next_key, **options)
        return feed.serve(thread, call)

    def start(
        self,
        group: Group,
        steps: Iterable[Task | Enqueue],
        *,
        queue: str | None = None,
        priority: int | None = None,
        conn: Any = None,
    ) -> SyncGroupHandle:
        """Start a group of the steps of a plain iterable, and return its handle: `Client.start`."""
        if not isinstance(steps, Iterable):
            raise EnqueueError(f"a SyncClient takes a plain iterable of steps, not {steps!r:.80}")
        if conn is not None:
            self._call(lambda conn: self._client.start(group, steps, queue=queue, priority=priority, conn=conn), conn)
        else:
            thread, feed = self._opened(), Feed(steps, None)
            feed.serve(thread, self._client.start(group, feed.steps(), queue=queue, priority=priority))
        return self.group(group.name)

    def group(self, name: str) -> SyncGroupHandle:
        """Return a group by its name, without I/O: `Client.group`."""
        self._client.group(name)  # refuses what is wrong
        return SyncGroupHandle(self._call, lambda: self._client.group(name), name)

    def task(self, id: UUID | str) -> SyncTaskHandle:
        """Return a task by its id, without I/O: `Client.task`."""
        checked = self._client.task(id).id
        return SyncTaskHandle(self._call, lambda: self._client.task(checked), checked)

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
    ) -> SyncTasks:
        """Choose tasks of the table, without I/O: `Client.tasks`."""
        wanted: dict[str, Any] = {"queue": queue, "task": task, "step": step, "state": state, "where": where}
        wanted |= {"error": error, "older_than": older_than, "key": key, "group": group}
        self._client.tasks(**wanted)  # refuses what is wrong
        return SyncTasks(self._call, lambda: self._client.tasks(**wanted))

    def stats(self) -> Statistics:
        """Count the tasks and measure the table: `Client.stats`."""
        return self._call(lambda _: self._client.stats())

    def failures(self) -> Iterator[ParkedTask]:
        """Yield the tasks that are parked from now on, without end: `Client.failures`."""
        thread = self._opened()
        parked = self._client.failures()
        try:
            while True:
                yield thread.run(parked.__anext__())
        finally:
            with suppress(EnqueueError):  # the client may have been closed
                thread.run(parked.aclose())


def run_to_end(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never suspends."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    coroutine.close()
    raise EnqueueError("a SyncClient takes nothing that is async")


async def _close_soon(client: Client) -> None:
    """Close the client, without waiting for long for calls that are under way."""
    async with asyncio.timeout(EXIT_TIMEOUT):
        await client.close()


def _not_open() -> EnqueueError:
    return EnqueueError("the client is not open; use it as: with SyncClient() as client")


def _forget_parents() -> None:
    for client in list(_clients):
        client._forget_parent()


def _end_all() -> None:
    for client in list(_clients):
        client._end()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_parents)
atexit.register(_end_all)
