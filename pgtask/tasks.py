"""Tasks in the table, from Python: one by its id, or all that a filter chooses; and the counts of the table.

Invariants: making a handle or a filter sends nothing; a wrong filter, time or queue raises `EnqueueError` before
anything is sent. A task that a worker runs is changed only by `cancel(force=True)`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any, Protocol, TypeVar
from uuid import UUID

import msgspec

from pgtask._placement import check_delay, check_key, check_one_time, check_time
from pgtask._postgres.listing import STATES, Cursor, TaskFilter, check_error_pattern
from pgtask._postgres.statistics import LaneCount, OpenTransaction, Statistics
from pgtask._postgres.task_changes import Cancel, Change, Move, Reschedule, Retry
from pgtask._postgres.task_status import TaskState, TaskStatus
from pgtask._postgres.tasks import TaskChange
from pgtask.errors import EnqueueError, TaskNotFound
from pgtask.policy import check_priority, check_queue
from pgtask.task import Task, family_of
from pgtask.task_function import TaskFunction
from pgtask.workflow import Workflow

__all__ = [
    "LaneCount",
    "OpenTransaction",
    "Statistics",
    "TaskHandle",
    "TaskState",
    "TaskStatus",
    "TaskStore",
    "Tasks",
    "choose_tasks",
]

Family = str | type[Task] | TaskFunction[..., Any] | Workflow[Any, Any]
"""A task: its class, the function made by `@task`, its workflow, or the name of one of these."""

T = TypeVar("T")


class TaskStore(Protocol):
    """The tasks of a client, in a database or in memory."""

    async def read_task(self, task: UUID) -> TaskStatus | None:
        """Return the status of a task, or None if the table has no such task."""

    async def change_task(self, task: UUID, change: Change, conn: Any) -> TaskChange:
        """Change one task."""

    async def list_page(self, wanted: TaskFilter, after: Cursor | None) -> tuple[list[TaskStatus], Cursor | None]:
        """Return a page of tasks, and the place of the next one, None at the end."""

    async def count_tasks(self, wanted: TaskFilter) -> int:
        """Count the tasks that a filter chooses."""

    async def change_tasks(self, wanted: TaskFilter, change: Change) -> int:
        """Change the tasks that a filter chooses, in portions; return how many were changed."""

    async def read_statistics(self) -> Statistics:
        """Return the statistics of the table."""


class TaskHandle:
    """A task, or a run of a workflow, by its `id`. Holds no connection.

    `cancel`, `retry`, `reschedule` and `move` return true if they have changed the task, and false if they have left it
    alone, since a worker runs it (or another session has just changed it). They raise `TaskNotFound` if the table has
    no such task. With `conn` they are part of the caller's transaction.
    """

    def __init__(self, store: TaskStore, id: UUID) -> None:
        self.id = id
        self._store = store

    def __repr__(self) -> str:
        return f"<task {self.id}>"

    async def status(self) -> TaskStatus:
        """Return its status as of now. Raises `TaskNotFound`, also when it has finished."""
        found = await self._store.read_task(self.id)
        if found is None:
            raise _not_found(self.id)
        return found

    async def cancel(self, *, force: bool = False, conn: Any = None) -> bool:
        """Remove it from the table; a run ends as CANCELLED, with its children.

        With `force` also while a worker runs it: the worker goes on with the step until it next renews the lease, and
        drops the outcome. In a transaction of yours that is not READ COMMITTED a run raises `EnqueueError`.
        """
        return await self._change(Cancel(force=force), conn)

    async def retry(self, *, conn: Any = None) -> bool:
        """Make it due now, at its step, without an error and with all the retries of its policy."""
        return await self._change(Retry(), conn)

    async def reschedule(self, *, at: datetime | None = None, after: timedelta | None = None, conn: Any = None) -> bool:
        """Make it due `at` a time or `after` one, by the database's clock. A parked task goes on then, without an error
        and with all its retries.

        False also for a run that pauses: what it waits for wakes it. Raises `EnqueueError` for a wrong time.
        """
        return await self._change(_reschedule(at, after), conn)

    async def move(self, *, queue: str | None = None, priority: int | None = None, conn: Any = None) -> bool:
        """Move it to another queue, another priority, or both; a parked task stays parked there. Its next step waits
        where the policy of that says. Raises `EnqueueError` for a wrong queue or priority, or neither."""
        return await self._change(_move(queue, priority), conn)

    async def _change(self, change: Change, conn: Any) -> bool:
        changed = await self._store.change_task(self.id, change, conn)
        if not changed.was_there:
            raise _not_found(self.id)
        return changed.is_done


class Tasks:
    """The tasks of the table that a filter chooses. Holds no connection, and no task.

        async for task in client.tasks(state="parked", error="TimeoutError%"):
            print(task.label, task.error)

    Each use reads the table anew. An iteration goes page by page in the order of `pgtask list`: tasks under a lease,
    due ones in claim order, scheduled ones, parked ones, the latest first. A task that changes its place meanwhile may
    come twice, or not at all.

    `cancel`, `retry`, `reschedule` and `move` do what those of `TaskHandle` do, to up to 2,000 tasks in a transaction,
    and return how many they have changed. They pass over tasks that are already so, that a worker runs, and that
    another session has locked. If you cancel a call, whole transactions stay done. Each call leaves a row in
    `pg_task_actions` (`pgtask actions`), so your role needs INSERT and UPDATE on that table.
    """

    def __init__(self, store: TaskStore, wanted: TaskFilter) -> None:
        self._store = store
        self._wanted = wanted

    def __repr__(self) -> str:
        return f"<tasks {self._wanted}>"

    async def __aiter__(self) -> AsyncIterator[TaskStatus]:
        rows, following = await self._store.list_page(self._wanted, None)
        while True:
            for row in rows:
                yield row
            if following is None:
                return
            rows, following = await self._store.list_page(self._wanted, following)

    async def count(self) -> int:
        """Count them. It reads all of them, by an index, ten thousand at a time."""
        return await self._store.count_tasks(self._wanted)

    async def cancel(self, *, force: bool = False) -> int:
        """Remove them; runs end as CANCELLED, with their children. Those that a worker runs only with `force`."""
        return await self._store.change_tasks(self._wanted, Cancel(force=force))

    async def retry(self) -> int:
        """Make them due now, without an error and with all the retries of their policies."""
        return await self._store.change_tasks(self._wanted, Retry())

    async def reschedule(self, *, at: datetime | None = None, after: timedelta | None = None) -> int:
        """Make them due `at` a time, or `after` one from now: all at the same time. Raises `EnqueueError`."""
        return await self._store.change_tasks(self._wanted, _reschedule(at, after))

    async def move(self, *, queue: str | None = None, priority: int | None = None) -> int:
        """Move them to another queue, another priority, or both. Raises `EnqueueError`."""
        return await self._store.change_tasks(self._wanted, _move(queue, priority))


def choose_tasks(
    *,
    queue: str | None,
    task: Family | None,
    step: str | type[Task] | None,
    state: str | Iterable[str] | None,
    error: str | None,
    older_than: timedelta | None,
    key: str | None,
    where: Mapping[str, object] | None,
    group: str | None,
) -> TaskFilter:
    """Return the filter of `Client.tasks`. Raises `EnqueueError`, which names the argument."""
    _check_text("queue", queue)
    if queue is not None and "," in queue:
        raise EnqueueError(f"tasks(queue={queue!r:.80}): no queue has a comma in its name; choose one queue at a time")
    _check_text("error", error)
    try:
        check_error_pattern(error or "")
    except ValueError as wrong:
        raise EnqueueError(f"tasks(error={error!r:.80}): {wrong}") from None
    _check_text("group", group)
    if None not in (group, key):
        raise EnqueueError("tasks(key=..., group=...): choose by one of them")
    family, name = _names(task, step)
    if key is not None and family is None:
        raise EnqueueError(f"tasks(key={key!r:.80}): a key belongs to a task; give task= as well")
    return TaskFilter(
        states=_choose_states(state, error),
        queues=None if queue is None else (queue,),
        task=family,
        step=name,
        error=error,
        older_than=None if older_than is None else timedelta(seconds=check_delay(older_than, "older_than")),
        key=None if key is None else check_key(key),
        where=() if where is None else tuple(_field(path, value) for path, value in where.items()),
        group=group,
    )


def _field(path: object, value: object) -> tuple[str, str]:
    """Return the path of a field and the text of a value, as JSON has it; that of a text without its quotes."""
    if not isinstance(path, str) or not all(path.split(".")):
        raise EnqueueError(f"tasks(where=...): {path!r:.80} is not the name of a field, as customer or address.city")
    try:
        raw = msgspec.json.encode(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise EnqueueError(f"tasks(where=...): the value of {path} cannot be JSON: {error}") from None
    plain = msgspec.json.decode(raw)
    text = plain if isinstance(plain, str) else raw.decode()
    _check_text("where", path + text)
    return path, text


def _check_text(name: str, value: object) -> None:
    if value is not None and (not isinstance(value, str) or "\0" in value):
        raise EnqueueError(f"tasks({name}={value!r:.80}) must be a text without NUL")


def _choose_states(state: str | Iterable[str] | None, error: str | None) -> tuple[str, ...]:
    chosen = {state} if isinstance(state, str) else None if state is None else set(state)
    if chosen is not None and (not chosen or not chosen <= set(STATES)):
        raise EnqueueError(f"tasks(state={state!r:.80}) must be one of {', '.join(STATES)}, or several of them")
    if error is not None:
        if chosen is not None and "parked" not in chosen:
            raise EnqueueError(
                f"tasks(error=..., state={state!r:.80}): only parked tasks have an error; leave out state"
            )
        return ("parked",)
    return STATES if chosen is None else tuple(one for one in STATES if one in chosen)


def _names(task: Family | None, step: str | type[Task] | None) -> tuple[str | None, str | None]:
    """Return the names of the task and of the step in the envelope."""
    family = None if task is None else _family_name(task)
    name: str | None = None
    if isinstance(step, type) and issubclass(step, Task):
        root = family_of(step)
        if root is None or root is step:
            raise EnqueueError(f"tasks(step={step.__name__}) is not a step; for all steps of a task give task=")
        named, name = root.__name__, step.__name__
    elif step is not None:
        if not isinstance(step, str) or not step or "\0" in step:
            raise EnqueueError(
                f"tasks(step={step!r:.80}) must be the class of a step, or its name, as Greeter.ReadName"
            )
        named, _, name = step.rpartition(".")
    else:
        return family, None
    if named and family not in (None, named):
        raise EnqueueError(f"tasks(task={family}) has no step {named}.{name}")
    return named or family, name


def _family_name(task: Family) -> str:
    if isinstance(task, (TaskFunction, Workflow)):
        return task.name
    if isinstance(task, type) and issubclass(task, Task) and (root := family_of(task)) is not None:
        if root is not task:
            raise EnqueueError(f"tasks(task={task.__name__}) is a step; give it as step=")
        return task.__name__
    if isinstance(task, str) and task and "\0" not in task:
        return task
    raise EnqueueError(f"tasks(task={task!r:.80}) must be a task or a workflow, or the name of one")


def _reschedule(at: datetime | None, after: timedelta | None) -> Reschedule:
    check_one_time(after, at)
    if at is None and after is None:
        raise EnqueueError("reschedule() needs a time: give at= or after=")
    delay = None if after is None else check_delay(after, "after")
    return Reschedule(at=None if at is None else check_time(at), delay=delay)


def _move(queue: str | None, priority: int | None) -> Move:
    if queue is None and priority is None:
        raise EnqueueError("move() needs a place: give queue=, priority=, or both")
    try:
        return Move(
            queue=None if queue is None else check_queue(queue),
            priority=None if priority is None else check_priority(priority),
        )
    except ValueError as error:
        raise EnqueueError(str(error)) from None


def _not_found(task: UUID) -> TaskNotFound:
    return TaskNotFound(
        f"task {task} is not in the table: it has finished, was cancelled, or never was; finished tasks leave the "
        "table (of a run that has ended, client.run(id).status() tells more)"
    )
