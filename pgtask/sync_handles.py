"""The handles of runs and tasks for sync code.

Invariant: each call goes the way of the client that has made the handle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any, Generic, TypeVar, overload
from uuid import UUID

from pgtask.errors import EnqueueError
from pgtask.groups import GroupHandle, GroupStatus
from pgtask.runs import Run, RunStatus
from pgtask.tasks import TaskHandle, Tasks, TaskStatus

__all__ = ["SyncGroupHandle", "SyncRun", "SyncTaskHandle", "SyncTasks"]

OutputT = TypeVar("OutputT")
T = TypeVar("T")


class SyncRun(Generic[OutputT]):
    """A run of a workflow, by its `id`: the methods of `Run`, without `await`."""

    def __init__(self, call: Callable[..., Any], run: Callable[[], Run[OutputT]], id: UUID) -> None:
        self.id = id
        self._call = call
        self._run = run

    def __repr__(self) -> str:
        return f"<run {self.id}>"

    def status(self) -> RunStatus:
        """Return its status as of now: `Run.status`."""
        status: RunStatus = self._call(lambda _: self._run().status())
        return status

    def result(self, timeout: timedelta | float | None = None) -> OutputT:
        """Wait until it has ended, and return its output: `Run.result`."""
        output: OutputT = self._call(lambda _: self._run().result(timeout))
        return output

    def signal(self, name: str, value: Any = None, *, conn: Any = None) -> None:
        """Send it a signal: `Run.signal`."""
        self._call(lambda conn: self._run().signal(name, value, conn=conn), conn)

    def cancel(self, *, conn: Any = None) -> bool:
        """End it and its children as CANCELLED: `Run.cancel`."""
        return bool(self._call(lambda conn: self._run().cancel(conn=conn), conn))

    def resume(self, *, conn: Any = None) -> bool:
        """Resume it after its last checkpoint: `Run.resume`."""
        return bool(self._call(lambda conn: self._run().resume(conn=conn), conn))


class SyncTaskHandle:
    """A task by its `id`: the methods of `TaskHandle`, without `await`."""

    def __init__(self, call: Callable[..., Any], task: Callable[[], TaskHandle], id: UUID) -> None:
        self.id = id
        self._call = call
        self._task = task

    def __repr__(self) -> str:
        return f"<task {self.id}>"

    def status(self) -> TaskStatus:
        """Return its status as of now: `TaskHandle.status`."""
        status: TaskStatus = self._call(lambda _: self._task().status())
        return status

    def cancel(self, *, force: bool = False, conn: Any = None) -> bool:
        """Remove it from the table: `TaskHandle.cancel`."""
        return bool(self._call(lambda conn: self._task().cancel(force=force, conn=conn), conn))

    def retry(self, *, conn: Any = None) -> bool:
        """Make it due now: `TaskHandle.retry`."""
        return bool(self._call(lambda conn: self._task().retry(conn=conn), conn))

    def reschedule(self, *, at: datetime | None = None, after: timedelta | None = None, conn: Any = None) -> bool:
        """Make it due at a time, or after one: `TaskHandle.reschedule`."""
        return bool(self._call(lambda conn: self._task().reschedule(at=at, after=after, conn=conn), conn))

    def move(self, *, queue: str | None = None, priority: int | None = None, conn: Any = None) -> bool:
        """Move it to another queue, another priority, or both: `TaskHandle.move`."""
        return bool(self._call(lambda conn: self._task().move(queue=queue, priority=priority, conn=conn), conn))


class SyncGroupHandle:
    """A group by its `name`: the methods of `GroupHandle`, without `await`."""

    def __init__(self, call: Callable[..., Any], group: Callable[[], GroupHandle], name: str) -> None:
        self.name = name
        self._call = call
        self._group = group

    def __repr__(self) -> str:
        return f"<group {self.name}>"

    def status(self) -> GroupStatus:
        """Return its progress as of now: `GroupHandle.status`."""
        status: GroupStatus = self._call(lambda _: self._group().status())
        return status

    def watch(self, interval: timedelta = timedelta(seconds=0.5)) -> Iterator[GroupStatus]:
        """Yield its progress until it has ended: `GroupHandle.watch`."""
        return _iterate(self._call, lambda: self._group().watch(interval))

    def wait(self) -> GroupStatus:
        """Wait until it has ended, and return its last status: `GroupHandle.wait`."""
        status: GroupStatus = self._call(lambda _: self._group().wait())
        return status

    @overload
    def results(self, type: type[T]) -> Iterator[T]: ...
    @overload
    def results(self, type: Any = Any) -> Iterator[Any]: ...
    def results(self, type: Any = Any) -> Iterator[Any]:
        """Yield what its members have returned: `GroupHandle.results`."""
        return (value for page in _iterate(self._call, lambda: self._group().pages(type)) for value in page)

    def tasks(self, *, parked: bool = False, error: str | None = None) -> SyncTasks:
        """Choose its members that are in the table: `GroupHandle.tasks`."""
        self._group().tasks(parked=parked, error=error)  # refuses what is wrong
        return SyncTasks(self._call, lambda: self._group().tasks(parked=parked, error=error))

    def retry(self, *, error: str | None = None) -> int:
        """Make its parked members due now: `GroupHandle.retry`."""
        return int(self._call(lambda _: self._group().retry(error=error)))

    def cancel(self, *, then: bool = True, conn: Any = None) -> bool:
        """Cancel it: `GroupHandle.cancel`."""
        return bool(self._call(lambda conn: self._group().cancel(then=then, conn=conn), conn))


class SyncTasks:
    """The tasks that a filter chooses: the methods of `Tasks`, without `await`."""

    def __init__(self, call: Callable[..., Any], tasks: Callable[[], Tasks]) -> None:
        self._call = call
        self._tasks = tasks

    def __repr__(self) -> str:
        return repr(self._tasks())

    def __iter__(self) -> Iterator[TaskStatus]:
        yield from _iterate(self._call, self._tasks)

    def count(self) -> int:
        """Count them: `Tasks.count`."""
        return int(self._call(lambda _: self._tasks().count()))

    def cancel(self, *, force: bool = False) -> int:
        """Remove them: `Tasks.cancel`."""
        return int(self._call(lambda _: self._tasks().cancel(force=force)))

    def retry(self) -> int:
        """Make them due now: `Tasks.retry`."""
        return int(self._call(lambda _: self._tasks().retry()))

    def reschedule(self, *, at: datetime | None = None, after: timedelta | None = None) -> int:
        """Make them due at a time, or after one: `Tasks.reschedule`."""
        return int(self._call(lambda _: self._tasks().reschedule(at=at, after=after)))

    def move(self, *, queue: str | None = None, priority: int | None = None) -> int:
        """Move them to another queue, another priority, or both: `Tasks.move`."""
        return int(self._call(lambda _: self._tasks().move(queue=queue, priority=priority)))


def _iterate(call: Callable[..., Any], make: Callable[[], Any]) -> Iterator[Any]:
    """Yield what an async iterable yields, which `make` makes."""
    rows = aiter(make())
    try:
        while True:
            try:
                yield call(lambda _: anext(rows))
            except StopAsyncIteration:
                return
    finally:
        with suppress(EnqueueError):  # the client may have been closed
            call(lambda _: rows.aclose())
